"""ONNX ops that only move or cut a constant: behind them zeros are zeros still, in other places.

An exporter leaves them between a weight and its product, such as the Transpose of a linear or the Split of a joined
``in_proj_weight``. Reading follows them, and writing replaces them by their result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MOVES = frozenset(("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice"))


def is_move(node: Any) -> bool:
    """Whether a node (NodeProto or `onnx_ir.Node`) moves or cuts its first input and does nothing else."""
    return node.op_type in MOVES and node.domain in ("", "ai.onnx")


def moved(node: Any, constants: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a NodeProto that moves constants, by name. constants: its inputs by name."""
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.output if name]
    values = ReferenceEvaluator(node).run(names, dict(constants))
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
