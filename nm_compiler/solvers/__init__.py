"""Masks and orders: arrays in, arrays out. Nothing here knows of graphs or models.

``x_kernels`` are the loops of ``x`` compiled by numba, ``x_triton`` are for a GPU; ``x`` chooses among them, the C kernels and
torch's operations. Results agree, to the bit where a file says nothing else.

Masks by magnitude:
magnitude            the N largest of every M, by torch
masks                the same as fast as memory allows
two_masks            both masks of Bi-Mask in one pass
rows_triton          its backward weight alone
transposable         N:M along both axes of a tile
two_of_four_kernels  of 4 x 4
select               a weight under a mask, and SR-STE's decay
check                how many non-zeros there are
importance           what to keep in the place of magnitude

LBC's live sets:
combinations         their forms, and retiring, by torch
live                 the same packed, by kernels

Orders of channels that keep more:
search               of one matrix, or of all weights that a class of channels runs through
search_members       those weights, and what is kept of them
search_matrix        all of them as one matrix
search_budget        how long it may take
anneal               the way for few channels: swaps
neighbourhood        the way for many: slots refilled
coarse               importances as bytes
packed_kernels       importances that are zero or one
independent          many searches at once
coupled              classes that influence each other
backward_order       Bi-Mask's, of output rows
device_order         the same by torch, where the weight lies
order_launch         the same of many weights on a GPU
order_triton         its kernels

What they stand on:
sweeps               the C kernels: each function says whether it took the work
gpu                  the Triton kernels, likewise
threads              work split over torch's threads
jit                  numba, and its cache
blocks_triton        blocks of a weight in registers
groups_triton        groups of a weight in registers
floats_triton        sums and products rounded as torch's
"""
