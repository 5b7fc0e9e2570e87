"""cuSPARSELt, through torch: linears and convolutions with packed 2:4 weights on NVIDIA's sparse tensor cores.

`candidates.candidates` says which products can be lowered and why the others cannot, `packing.pack` packs a weight,
``nm::cslt_linear`` (`op`) multiplies with it, `search.search` looks for a faster algorithm.
`nm_compiler.passes.lower_cusparselt` rewrites a graph.
"""
