"""The tables of benchmarks/solvers.py: one file a question, each prints its table and returns what goes into the JSON."""
