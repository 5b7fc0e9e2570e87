"""Let a convolution that stays dense activate while it writes, where oneDNN computes it.

    before                                                  after
    %y = aten.conv2d(%x, %w, %b, [1, 1], [1, 1], .., 32)    %z = mkldnn._convolution_pointwise(%x, %w, %b, [1, 1], [1, 1],
    %z = aten.hardtanh(%y, 0, 6)                                     [1, 1], 32, "hardtanh", [0, 6], "")

Only float32 with channels innermost, where oneDNN computes nearly all convolutions anyhow and torch knows this op's strides.
Depthwise convolutions gain: an activation, a pass over memory, takes about as long as they do. oneDNN's ReLU makes 0 of NaN.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from nm_compiler.graph import arguments_of
from nm_compiler.passes.fuse_epilogues import activation_of, next_step, written_between
from nm_compiler.rewrite import call, replace
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.runtime.native.eligible import Conv, geometry
from nm_compiler.sites.uses import CONVS

_NAMES: dict[str, tuple[str, list[float], str]] = {
    "relu": ("relu", [], ""), "relu6": ("hardtanh", [0, 6], ""), "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
}  # fmt: skip
"""oneDNN's word for an activation, its numbers and its algorithm."""


def fuse_dense(gm: GraphModule) -> GraphModule:
    """Fuse the activation behind every dense convolution of images whose channels are innermost."""
    if not torch.backends.mkldnn.is_available():
        return gm
    for node in list(gm.graph.nodes):
        if node.target not in CONVS or not _computed_by_onednn(node):
            continue
        between, step = next_step(node)
        name = None if step is None or between else activation_of(step)
        conv = geometry(node)
        if step is not None and name in _NAMES and conv is not None and not written_between(node, between, step):
            _fuse(gm, node, step, conv, _NAMES[name])
    return gm


def _computed_by_onednn(node: Node) -> bool:
    data, weight = (operand.meta["val"] for operand in node.args[:2])  # type: ignore[union-attr]
    floats = data.dtype == weight.dtype == torch.float32 and data.device.type == "cpu"
    return floats and data.ndim == 4 and lies_in_channels_last(data)


def _fuse(gm: GraphModule, node: Node, step: Node, conv: Conv, how: tuple[str, list[float], str]) -> None:
    sizes = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    with gm.graph.inserting_before(step):
        target = torch.ops.mkldnn._convolution_pointwise.default
        fused = call(gm, target, (*node.args[:2], arguments_of(node)["bias"], *sizes, *how), f"{node.name}_fused")
    replace(step, fused)
    gm.graph.erase_node(node)
