"""Coupled axes: which weight axes one order must permute together, and which keep their order, over any captured graph.

graph --analysis (rules/)--> terms --dependence--> analyse --> Axes --search, orders--> orders --passes/permute--> weights

Found:
analyse      the whole way from captured graphs to the coupled axes
analysis     a walk over a graph, with a rule for each op
terms        what is known of one axis, and what unifying two of them does
dependence   orders that may differ from head to head
outputs      which outputs must keep their order
result       the coupled axes as a value: `Axes`

Shown:
draw         as a picture
network      as a networkx graph

Ordered:
search       orders that let masks keep the most
coordinates  where a class lies in an axis that is merged from several
orders       orders that a user gives, checked
reorder      a tensor in another order
"""
