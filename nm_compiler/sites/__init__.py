"""Which weights become N:M, and why the others cannot.

plan       the decision, weight by weight: `Site`, `Refusal`, `Plan`
uses       from a weight to the products that read it
views      through steps that keep its zeros
equations  every product as an einsum
ends       the stem and the head
routers    what chooses the weights that come next
"""
