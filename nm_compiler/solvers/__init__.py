"""Masks and orders: arrays in, arrays out. Nothing here knows of graphs or models."""
