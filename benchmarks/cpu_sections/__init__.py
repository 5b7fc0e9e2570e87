"""The tables of benchmarks/cpu.py."""
