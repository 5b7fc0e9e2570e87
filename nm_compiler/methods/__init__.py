"""One file, one method: which state a weight gets, and what happens to it between optimizer steps."""
