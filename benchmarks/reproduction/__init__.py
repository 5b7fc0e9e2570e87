"""The papers' CIFAR-10 tables again: what `cifar10.py` runs, one idea a file.

grid        which runs a table has, and with which hyper-parameters
models      the networks
images      CIFAR-10 on the device, with its augmentation
stepping    one optimizer step, eager or as a CUDA graph
training    one run from its first step to its JSON, resumable
pool        several runs at once, each in a process of its own, and how many epochs fit a time
"""
