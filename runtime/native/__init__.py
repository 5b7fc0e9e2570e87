"""CPU kernels for N:M weights: C without torch or Python.h, loaded through ctypes; and what packs weights for them."""
