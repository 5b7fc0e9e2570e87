"""Checkpoints that are larger than memory: read, pruned, verified and written a few megabytes at a time.

prune        a folder into another one
folder       what lies in a checkpoint folder
tensor_file  what lies in one of its files
meta_model   the model that it describes, without values
planning     which tensors become N:M
statistics   norms of inputs, for Wanda and RIA
judging      what to keep of a weight, part by part
ordering     orders of coupled channels
parts        a tensor a few megabytes at a time
whole        files that are there whole or not at all
journal      what a run was asked for, so that a killed one goes on
"""
