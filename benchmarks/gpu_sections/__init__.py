"""The tables of benchmarks/gpu.py: one file a question; each prints its table and returns what goes into the JSON."""
