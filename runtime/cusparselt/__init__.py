"""cuSPARSELt: linears and convolutions with packed 2:4 weights on NVIDIA's sparse tensor cores.

Which products (`nm_compiler.passes.lower_cusparselt` rewrites them):
candidates   those of a graph, each with the reasons against it
eligible     these reasons
consumers    whose results may lie in columns
measuring    timed, packed and dense

The ops:
op           ``nm::cslt_linear``
unfold       a convolution as a linear
int8         ``nm::cslt_linear_int8``, values rounded to 8 bits
training     ``nm::cslt_train_linear``, packed in every step

Packed weights:
packing      once, when a graph is lowered
compress     in every step of a training
layout       how the library lays them out
pack_triton  our kernel that writes that layout

The library, which is the one that torch ships with:
library      its C functions
direct       products by them
plan         what one product needs on the host
plans        those of a thread, kept
algorithm    the number that stands for one of its algorithms
search       a faster one is looked for
trials       and timed, after its numbers were compared
"""
