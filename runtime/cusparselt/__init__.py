"""cuSPARSELt: linears and convolutions with packed 2:4 weights on NVIDIA's sparse tensor cores.

`candidates.candidates` says which products can be lowered and why the others cannot, `packing.pack` packs a weight,
``nm::cslt_linear`` (`op`) multiplies with it, `search.search` looks for a faster algorithm. The library is the one that torch
ships with: called directly on kept plans (`direct`, `plans`, `plan`, `library`) or through torch.
`nm_compiler.passes.lower_cusparselt` rewrites a graph.
"""
