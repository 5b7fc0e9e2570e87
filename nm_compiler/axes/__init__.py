"""Coupled axes: which weight axes one order must permute together, and which keep their order, over any captured graph.

graph --analysis (rules/)--> terms --dependence--> analyse --> Axes --search, orders--> orders --passes/permute--> weights
"""
