"""Checkpoints that are larger than memory: read, pruned, verified and written a few megabytes at a time."""
