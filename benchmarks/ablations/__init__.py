"""Choices of the methods, one at a time, on scikit-learn's digits: what `ablation.py` runs.

digits        the network, its data and one training, the same for all variants
orders        Bi-Mask's backward order: our search, the paper's random draws, none
retirement    LBC: for good, or as the released code does it
"""
