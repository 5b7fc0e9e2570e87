"""Compute linears and convolutions of 2:4 weights with cuSPARSELt, on packed weights.

    before                                             after
    %w = self.fc.weight            # [out, in], 2:4    %p = self.fc_weight_packed             # 9/16 of the bytes
    %y = aten.linear(%x, %w, %b)   # [..., out]        %t = aten.reshape(%x, [-1, in])        # if it is not 2-D
                                                       %z = nm.cslt_linear(%t, %p, %b, out, in, 0, False)
                                                       %c = aten.contiguous(%z)               # z lies in columns
                                                       %y = aten.reshape(%c, [..., out])

    %y = aten.conv2d(%x, %w, %b)   # [.., out, H, W]   %q = aten.permute(%x, [.., H, W, in])
                                                       ...   # as above, then back, in the memory format it had

    the same with 3x3 taps, stride   # and unfold=True %q = nm.unfold_taps(%x, [3, 3], ..)  # [.., H', W', 9 in]
    or padding                                         ...   # as above

    %r = aten.relu(%y)             # its only reader   %z = nm.cslt_linear(%t, %p, %b, out, in, 0, False, 'relu')

The last only where the library is called directly (`nm_compiler.runtime.cusparselt.direct`): torch's call has no activations.
The copy into rows is left out where the result goes through elementwise ops to other packed products only
(`nm_compiler.runtime.cusparselt.consumers`), and where a searched algorithm writes rows itself. Everyone else finds
results laid out as they were when the graph was traced. The model is not touched; packed weights are constants of the graph.
Ref: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nm_compiler.evaluate import value_of
from nm_compiler.graph import arguments_of
from nm_compiler.rewrite import call, constant, replace
from nm_compiler.runtime.cusparselt.candidates import LINEAR, Candidate, candidates
from nm_compiler.runtime.cusparselt.consumers import between, leave_in_columns
from nm_compiler.runtime.cusparselt.direct import binding
from nm_compiler.runtime.cusparselt.eligible import MIN_TOKENS, Machine
from nm_compiler.runtime.cusparselt.op import cslt_linear
from nm_compiler.runtime.cusparselt.packing import pack
from nm_compiler.runtime.cusparselt.search import Searches
from nm_compiler.runtime.cusparselt.unfold import Geometry, matrix_of, unfold_taps
from nm_compiler.runtime.memory_format import lies_in_channels_last
from nm_compiler.sites.plan import Site

aten = torch.ops.aten
RELUS = (aten.relu.default, aten.relu_.default)


def lower_cusparselt(
    gm: GraphModule,
    *,
    sites_by_read: Mapping[str, Site],
    choose: Callable[[Node], bool] | None = None,
    search: bool | Searches = False,
    machine: Machine | None = None,
    min_tokens: int = MIN_TOKENS,
    unfold: bool = False,
    fuse: bool | None = None,
) -> GraphModule:
    """Lower every product without a reason against it, unless ``choose(node)`` says no.

    gm: frozen and cast to float16 or bfloat16, on the GPU; sites_by_read: what a ``get_attr`` node reads -> its site.
    search: look for a faster algorithm, for as many tokens as the example had, on the GPU; or by what has been found already.
    machine, min_tokens, unfold: as for `nm_compiler.runtime.cusparselt.candidates.candidates`, which lists the reasons.
    fuse: whether a relu that alone reads a product becomes part of it; None to do so where the library is called directly.
    """
    found = candidates(gm, sites_by_read, machine=machine, min_tokens=min_tokens, unfold=unfold)
    chosen = {each.node: each for each in found if not each.reasons and (choose is None or choose(each.node))}
    searches = Searches() if search is True else search or None
    weights: dict[Any, tuple[Node, Tensor, Tensor]] = {}
    moved: set[Node] = set()
    columns = {node: between(node, chosen) if node.target is LINEAR else None for node in chosen}
    for node, candidate in chosen.items():
        read, value, packed = _packed(gm, candidate.weight, weights)
        relu = _relu(node) if fuse or (fuse is None and binding(value.device) is not None) else None
        activation = "" if relu is None else "relu"
        algorithm = 0 if searches is None else _searched(gm, candidate, value, packed, activation, searches)
        stays = columns[node] if not algorithm else None
        result = _rewrite(gm, candidate, read, value, algorithm, activation, copied=not algorithm and stays is None)
        if relu is not None:
            relu.replace_all_uses_with(result)
            gm.graph.erase_node(relu)
        if stays is not None:
            moved.update((result, *(each for each in stays if each is not relu)))
    leave_in_columns(moved)
    return gm


def _relu(node: Node) -> Node | None:
    """The relu that alone reads a product."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in RELUS else None


def _packed(gm: GraphModule, weight: Node, known: dict[Any, tuple[Node, Tensor, Tensor]]) -> tuple[Node, Tensor, Tensor]:
    """A read of the packed weight, the dense value, the packed one. What several products read is packed once."""
    key = weight.target if weight.op == "get_attr" else weight
    if key not in known:
        value = matrix_of(value_of(gm, weight))
        packed = pack(value)
        with gm.graph.inserting_after(weight):
            known[key] = constant(gm, f"{weight.name}_packed", packed), value, packed
    return known[key]


def _searched(
    gm: GraphModule, candidate: Candidate, value: Tensor, packed: Tensor, activation: str, searches: Searches
) -> int:
    if candidate.product.tokens is None:
        return 0
    bias = arguments_of(candidate.node)["bias"]
    x = torch.randn(candidate.product.tokens, value.shape[1], device=value.device, dtype=value.dtype)
    with torch.no_grad():
        added = None if bias is None else value_of(gm, bias)
        return searches(value, packed, x, added, activation)


def _rewrite(
    gm: GraphModule, candidate: Candidate, read: Node, value: Tensor, algorithm: int, activation: str, *, copied: bool
) -> Node:
    node = candidate.node
    data: Any = node.args[0]
    out, width = value.shape
    bias = arguments_of(node)["bias"]
    convolved = node.target is not LINEAR
    rank = data.meta["val"].ndim
    lead = list(range(rank - 3))
    with gm.graph.inserting_before(node):
        last, kept = data, list(node.meta["val"].shape[:-1])
        if convolved:
            last = _pixels(gm, data, candidate.product.geometry or Geometry())
            kept = [size for axis, size in enumerate(node.meta["val"].shape) if axis != rank - 3]
        sizes = [size if isinstance(size, int) else gm.graph.call_function(aten.sym_size.int, (last, axis))
                 for axis, size in enumerate(kept)]  # fmt: skip
        flat = last if len(sizes) == 1 else gm.graph.call_function(aten.reshape.default, (last, [-1, width]))
        given = (flat, read, bias, out, width, algorithm, algorithm > 0, *((activation,) if activation else ()))
        result = call(gm, cslt_linear._opoverload, given, f"{node.name}_packed")
        if copied and not convolved:
            result = gm.graph.call_function(aten.contiguous.default, (result,))
        if len(sizes) != 1:
            result = gm.graph.call_function(aten.reshape.default, (result, [*sizes, out]))
        if convolved:
            back = [*lead, rank - 1, rank - 3, rank - 2]
            result = gm.graph.call_function(aten.permute.default, (result, back))
            result = gm.graph.call_function(aten.contiguous.default, (result,), {"memory_format": _format(node)})
    replace(node, result)
    return result


def _pixels(gm: GraphModule, data: Node, geometry: Geometry) -> Node:
    """``[.., H', W', taps * in]``: what each output pixel reads."""
    if geometry.plain:
        rank = data.meta["val"].ndim
        axes = [*range(rank - 3), rank - 2, rank - 1, rank - 3]
        return gm.graph.call_function(aten.permute.default, (data, axes))
    arguments = (data, *map(list, (geometry.taps, geometry.stride, geometry.sides, geometry.dilation)))
    return call(gm, unfold_taps._opoverload, arguments, f"{data.name}_unfolded")


def _format(node: Node) -> torch.memory_format:
    return torch.channels_last if lies_in_channels_last(node.meta["val"]) else torch.contiguous_format
