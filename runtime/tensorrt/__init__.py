"""TensorRT, through Torch-TensorRT: what `nm.lower(..., backend="tensorrt")` does once the program is frozen and cast.

build     engines of a program
profiles  the smallest, the usual and the largest batch of an engine
options   what Torch-TensorRT is called with
eligible  which products may get a sparse kernel
log       which of them TensorRT gave one
files     engines saved and loaded
versions  which Torch-TensorRT goes with which torch

torch_tensorrt is imported when one of them is called, never before.
"""
