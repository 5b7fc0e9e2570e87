# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""One weight for every reason why planning leaves it dense, all read by one model, so that one capture shows them all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from nm_compiler.capture.export import capture_mode
from nm_compiler.pattern import PatternMap
from nm_compiler.sites.plan import Plan, find

BEHIND = "behind it zeros are no longer zeros, so use a layer whose weight is a plain parameter"
AS_READ = "keep the parameter in the shape that its product reads"
READ_ADD = "read by aten.add.Tensor, which has no N:M rule"

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


READERS: list[tuple[str, tuple[int, ...], Call]] = [
    # the reason, the shape of the weight w, and what reads it: x is data [8, 8], o another weight [8, 8]
    ("an embedding: rows are looked up, not multiplied", (9, 8), lambda x, w, o: F.embedding(x.long(), w)),
    ("shared with an embedding: untie them to make it sparse", (9, 8), lambda x, w, o: F.linear(F.embedding(x.long(), w), w)),
    (f"shared: also {READ_ADD}", (8, 8), lambda x, w, o: F.linear(x + w, w)),
    ("used along different axes by different products: give each a weight of its own", (8, 8), lambda x, w, o: F.linear(x, w) @ w),
    ("5 input features, groups of 2:4 need a multiple of 4", (8, 5), lambda x, w, o: F.linear(x[:, :5], w)),
    ("6 input channels, groups of 2:4 need a multiple of 4", (8, 6, 1), lambda x, w, o: F.conv1d(x[:, :6, None], w)),
    ("2 input channels in each of 4 conv groups, groups of 2:4 need a multiple of 4", (8, 2, 1), lambda x, w, o: F.conv1d(x[..., None], w, groups=4)),
    ("3 weights along axis 2, groups of 2:4 need a multiple of 4", (8, 2, 3), lambda x, w, o: F.linear(x[:, :6], w.flatten(1))),
    ("a product reads inputs 0 to 5 of 8 by themselves, which cuts groups of 2:4: slice at multiples of 4", (8, 8), lambda x, w, o: F.linear(x[:, :6], w[:, :6])),
    (f"read by aten.mul.Tensor, and then {READ_ADD}: {BEHIND}", (8, 8), lambda x, w, o: F.linear(x, w * 2 + o)),
    ("added to the result of aten.addmm, as a bias is", (8, 8), lambda x, w, o: torch.addmm(w, x, o)),
    ("multiplied with itself before any data: multiply the data with it twice", (8, 8), lambda x, w, o: x @ (w @ w)),
    ("the input of a linear, not its weight: multiply data with it, as in w @ x.T", (8, 8), lambda x, w, o: F.linear(w, o)),
    ("multiplied with another weight before any data: multiply the data with one, then the other", (8, 8), lambda x, w, o: x @ (w @ o)),
    ("einsum sums over one of its axes before the product: make the sum the parameter", (8, 8), lambda x, w, o: torch.einsum("bi,oi->bi", x, w)),
    ("a transposed convolution: no N:M kernel reduces along its axis", (8, 8, 1), lambda x, w, o: F.conv_transpose1d(x[..., None], w)),
    ("depthwise convolution: one input channel a group, nothing to choose from", (8, 1, 1), lambda x, w, o: F.conv1d(x[..., None], w, groups=8)),
    ("expanded along the axis that its product sums over: store it at full size", (8, 1), lambda x, w, o: F.linear(x, w.expand(8, 8))),
    (f"reshaped across its axes: {AS_READ}", (6, 4), lambda x, w, o: F.linear(x[:, :6], w.view(4, 6))),
    ("multiplied element by element: its product sums over none of its axes", (8, 8), lambda x, w, o: torch.einsum("bi,bi->bi", x, w)),
    ("its product reads weights 2 apart, groups need consecutive ones", (8, 16), lambda x, w, o: F.linear(x, w[:, ::2])),
    ("indexed along the axis that its product sums over: index the data in its place", (8, 8), lambda x, w, o: F.linear(x, w[:, torch.arange(7, -1, -1)])),
    ("no output axis: every weight row meets data of its own", (8, 8), lambda x, w, o: torch.einsum("bi,bi->b", x, w)),
    ("returned by the model as it is", (8, 8), lambda x, w, o: w),
    ("bilinear sums over two axes of it at once: write two products", (8, 8, 8), lambda x, w, o: F.bilinear(x, x, w)),
    ("a factor of another weight", (8, 8), lambda x, w, o: F.linear(x, o / w)),
    ("joined with other weights before its product: write a product for each, or keep one joined parameter", (8, 8), lambda x, w, o: F.linear(x, torch.cat([w, o]))),
    (f"{READ_ADD}: {BEHIND}", (8, 8), lambda x, w, o: F.linear(x, w + o)),
    (READ_ADD, (1, 8), lambda x, w, o: x + w),
    (f"aten.view mixes its axes: {AS_READ}", (4, 16), lambda x, w, o: x @ w.T.contiguous().view(8, 8)),
    ("indexed along several axes, or by a mask: make what is left the parameter", (8, 8), lambda x, w, o: x[:1] @ w[torch.arange(8), torch.arange(8)]),
    ("addmm with alpha or beta other than 1: scale the result in its place", (8, 8), lambda x, w, o: torch.addmm(x, x, w, alpha=2)),
    ("an einsum of 3 tensors: write it as products of two", (8, 8), lambda x, w, o: torch.einsum("bi,oi,bi->bo", x, w, x)),
    ("an einsum that reads a diagonal: make the diagonal the parameter", (8, 8), lambda x, w, o: torch.einsum("bi,ii->b", x, w)),
]  # fmt: skip


class Readers(nn.Module):
    """Weights ``w0``, ``w1``, ... read as `READERS` says, and a few that are no parameter of a product."""

    def __init__(self) -> None:
        super().__init__()
        for number, (_, shape, _) in enumerate(READERS):
            self.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"o{number}", nn.Parameter(torch.randn(8, 8)))
        self.lstm, self.unread = nn.LSTM(8, 8), nn.Parameter(torch.randn(8, 8))
        self.counts = nn.Parameter(torch.ones(8, 8, dtype=torch.int64), requires_grad=False)
        self.register_buffer("basis", torch.randn(8, 8))
        self.table = torch.randn(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        given = self._parameters
        read = [call(x, given[f"w{number}"], given[f"o{number}"]) for number, (_, _, call) in enumerate(READERS)]
        return (*read, self.lstm(x[None])[0], x @ self.counts.float(), x @ self.basis, x @ self.table)


@functools.cache
def captured() -> tuple[nn.Module, GraphModule]:
    model = Readers()
    return model, capture_mode(model, (torch.rand(8, 8),), {}, ({},), training=False)[0]


def planned(pattern: Any = "2:4", **options: Any) -> Plan:
    model, gm = captured()
    return find(model, [gm], PatternMap.parse(pattern), **options)


@functools.cache
def reasons() -> dict[str, str]:
    """Why each weight of `Readers` stays dense, where it does, with nothing taken for stem or head."""
    return {refusal.where: refusal.reason for refusal in planned(include=["w*", "o*"]).refusals}
