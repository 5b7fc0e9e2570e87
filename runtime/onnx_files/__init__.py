"""ONNX files: a frozen program written as one, with its zeros checked in the file, and any such file read again.

export     the whole of it: write, read back, compare
folding    ops that only move a weight are gone
moves      which ops those are
dtypes     casts before a product are gone
later      folded weights that are computed when they are written
naming     values are called as in the user's model
streaming  written from where the weights lie
saving     put in its place whole or not at all
reading    what the products of a file multiply with
outline    a file's structure without its weights
found      what became of the planned weights
numerics   compared with onnxruntime
parts      run part by part
wide       float16 as onnxruntime rounds it
commands   what to run where TensorRT is
packages   what has to be installed
"""
