"""The table of ONNX operators, read once: torch.onnx parses it anew in every export, which is half of a small one's time."""

from __future__ import annotations

import functools


def read_operators_once() -> None:
    """For the rest of the process. Exports only look things up in it, as long as none brings translations of its own."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    if not hasattr(ONNXRegistry.from_torchlib, "cache_info"):
        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
