"""Attention: orders of their own in every head, whole heads as blocks, grouped queries, and what a fused qkv leaves to v."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.axes.result import Axes, AxisClass

Cut = Callable[[Tensor], tuple[Tensor, ...]]


class Fused(nn.Module):
    """Two heads of four from one projection, in the layout that ``cut`` takes apart."""

    def __init__(self, cut: Cut, softmax: int = -1) -> None:
        super().__init__()
        self.qkv, self.out, self.cut, self.softmax = nn.Linear(8, 24), nn.Linear(8, 8), cut, softmax

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(self.qkv(x))
        mixed: Tensor = self.out(((q @ k.mT).softmax(self.softmax) @ v).transpose(1, 2).flatten(2))
        return mixed


class Grouped(nn.Module):
    """Four query heads share two heads of keys and values."""

    def __init__(self, many: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)
        self.many = many

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, self.many(k), self.many(v)).transpose(1, 2).flatten(2))
        return mixed


X = torch.randn(2, 5, 8)
CUTS: dict[str, Cut] = {
    "3 h d": lambda y: tuple(y.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)),
    "h 3 d": lambda y: tuple(y.unflatten(-1, (2, 3, 4)).permute(3, 0, 2, 1, 4).unbind(0)),
    "h (3 d) chunk": lambda y: tuple(y.unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)),
    "chunk": lambda y: tuple(t.unflatten(-1, (2, 4)).transpose(1, 2) for t in y.chunk(3, -1)),
    "slices": lambda y: tuple(y[..., i : i + 8].unflatten(-1, (2, 4)).transpose(1, 2) for i in (0, 8, 16)),
}


def permuted(model: nn.Module, x: Tensor = X) -> Axes:
    """The axes of a model that computes the same, to 1e-12, after every free one of them was permuted at random."""
    model, x = model.double().eval(), x.double()
    with torch.no_grad():
        before = model(x)
        done = nm.permute(model, (x,), order="random", include=["*"])
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    return done.axes


def shapes(classes: tuple[AxisClass, ...]) -> list[tuple[int, ...]]:
    return [(*each.rows, each.size) for each in classes]


@pytest.mark.parametrize("layout", CUTS)
def test_every_head_has_an_order_of_its_own_and_v_is_not_tied_to_q_and_k(layout: str) -> None:
    axes = permuted(Fused(CUTS[layout]))
    assert sorted(shapes(axes.free)) == [(2,), (2, 4), (2, 4)]  # heads; q with k in each head; v in each head
    heads, first, second = sorted(axes.free, key=lambda each: len(each.rows))
    assert first.needs == second.needs == (heads.name,)
    reduced = {each.name for each in axes.free if any(str(member) == "out.weight[1]" for member in each.members)}
    assert len(reduced) == 2, "the output projection reads heads and v, nothing of q and k"


def test_interleaved_q_k_v_share_the_order_of_their_channels() -> None:
    model = Fused(lambda y: tuple(y.unflatten(-1, (2, 4, 3)).permute(4, 0, 2, 1, 3).unbind(0)))
    assert sorted(shapes(permuted(model).free)) == [(2,), (2, 4)]


def test_whole_heads_change_places_as_blocks() -> None:
    model = Fused(CUTS["3 h d"]).double()
    axes = nm.show_axes(model, (X.double(),))
    (heads,) = (each for each in axes.free if not each.rows)
    before, weight = model(X.double()), model.qkv.weight.detach().clone()
    nm.permute(model, (X.double(),), order={heads.name: [1, 0]}, include=["*"])
    torch.testing.assert_close(model(X.double()), before, rtol=0, atol=1e-12)
    assert torch.equal(model.qkv.weight, weight.unflatten(0, (3, 2, 4)).flip(1).flatten(0, 2))


def test_an_order_of_one_row_serves_all_heads_and_one_of_two_each_its_own() -> None:
    model = Fused(CUTS["3 h d"]).double()
    axes = nm.show_axes(model, (X.double(),))
    value = next(each for each in axes.free if each.rows and any(str(member) == "out.weight[1]" for member in each.members))
    before, weight = model(X.double()), model.out.weight.detach().clone()
    nm.permute(model, (X.double(),), order={value.name: [[3, 2, 1, 0], [1, 0, 2, 3]]}, include=["*"])
    torch.testing.assert_close(model(X.double()), before, rtol=0, atol=1e-12)
    assert torch.equal(model.out.weight, weight[:, [3, 2, 1, 0, 5, 4, 6, 7]])
    nm.permute(model, (X.double(),), order={value.name: [1, 0, 2, 3]}, include=["*"])
    torch.testing.assert_close(model(X.double()), before, rtol=0, atol=1e-12)
    assert torch.equal(model.out.weight, weight[:, [2, 3, 1, 0, 4, 5, 6, 7]])


@pytest.mark.parametrize(
    "many",
    [
        lambda t: t.repeat_interleave(2, 1),
        lambda t: t.repeat(1, 2, 1, 1),
        lambda t: t[:, :, None].expand(-1, 2, 2, 5, 4).flatten(1, 2),
        lambda t: t[:, None].expand(-1, 2, 2, 5, 4).flatten(1, 2),
    ],
    ids=["repeat_interleave", "repeat", "expand", "expand in front"],
)
def test_grouped_heads_move_with_their_group_and_inside_it(many: Callable[[Tensor], Tensor]) -> None:
    axes = permuted(Grouped(many))
    groups = axes["k.weight[0].0"] if "k.weight[0].0" in {each.name for each in axes} else axes.free[0]
    assert groups.size == 2
    assert sum(each.size == 4 and each.rows[0] == 2 for each in axes.free if each.rows) == 2  # q with k, and v: in each group
    assert len(axes.free) == 4


def test_softmax_across_heads_keeps_per_head_orders_but_sorting_across_them_does_not() -> None:
    assert (2, 4) in shapes(permuted(Fused(CUTS["3 h d"], softmax=1)).free)

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x).unflatten(-1, (2, 4)).sort(-2).values.flatten(-2))
            return y

    assert all(not each.rows for each in permuted(Sorted()).free)


def test_rotary_positions_pin_the_channels_of_q_and_k_and_leave_v_and_heads_free() -> None:
    def rotate(t: Tensor) -> Tensor:
        angle = torch.arange(t.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = torch.cat([angle.cos()] * 2, -1).to(t.dtype), torch.cat([angle.sin()] * 2, -1).to(t.dtype)
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    def cut(y: Tensor) -> tuple[Tensor, ...]:
        q, k, v = CUTS["3 h d"](y)
        return rotate(q), rotate(k), v

    model = Fused(cut)
    assert sorted(shapes(permuted(model).free)) == [(2,), (2, 4)]
