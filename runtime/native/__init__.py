"""CPU kernels for N:M weights: C without torch or Python.h, loaded through ctypes; and what packs weights for them.

building   compiled when the package is installed
library    loaded, and an instruction set chosen
job        what the kernels of packed products are told
sweep      the same of those over weights that are not packed
packing    a weight as they read it
pages      packed weights in huge pages
shapes     what a product's shapes decide, worked out once for each
ops        ``nm::packed_linear`` and ``nm::packed_conv2d``
eligible   which products they take, and why not the others
volumes    convolutions over three axes as products over two
measuring  a product timed, packed and dense
whole      a graph timed, packed and dense
"""
