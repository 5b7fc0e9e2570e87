"""The rules of the axis analysis on tiny nets: permuting all that is free changes nothing, and nothing less is free."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from axis_nets import CASES
from torch import Tensor, nn

from nm_compiler import law
from nm_compiler.capture import export as capture
from nm_compiler.law import BOUNDS, Law, permutation_law

TOGETHER = 12  # a capture of many nets costs little more than a capture of one
NAMES = list(CASES)
GROUPS = [NAMES[i : i + TOGETHER] for i in range(0, len(NAMES), TOGETHER)]
UNKNOWN = {"_foreach_add"}  # have no rule: pinned, and said so


class Several(nn.Module):
    """Nets side by side, each with an input and an output of its own."""

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(net(x) for net, x in zip(self.nets.values(), inputs, strict=True))


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluation mode only, sizes fixed: the nets write their sizes out."""

    def once(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[bool, Any]:
        model.eval()
        return {False: capture._export(model, args, dict(kwargs), ([None] * len(args[0]),), {}, False)}

    monkeypatch.setattr(law, "capture", once)
    gc.disable()
    yield
    gc.enable()


def checked(names: Sequence[str], undo: int = 0) -> Law:
    made = {name: CASES[name].make() for name in names}
    return permutation_law(
        Several({name: net for name, (net, _) in made.items()}), ([x for _, x in made.values()],), undo=undo
    )


@pytest.mark.ci(here=["moe_gather", "[lstm", "attn_causal", "inplace_swap", "where_param"])
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]}...{names[-1]}")
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_a_random_order_of_all_that_is_free_changes_nothing(names: list[str]) -> None:
    found = checked(names)
    wrong = [] if found.error < BOUNDS[torch.float64] else [n for n in names if checked([n]).error > BOUNDS[torch.float64]]
    assert found.error < BOUNDS[torch.float64], f"{wrong}: {found}"
    free = Counter(each.name.split(".")[1] for each in found.axes.free)
    assert {name: free[name] for name in names} == {name: CASES[name].free for name in names}, str(found.axes)
    assert set(found.axes.unknown) <= UNKNOWN, str(found.axes)


@pytest.mark.parametrize("name", ["heads_view", "swinv2_bias", "c_shuf_unit2", "mamba2", "mla", "c_group_change"])
def test_undoing_any_one_axis_is_noticed(name: str) -> None:
    found = checked([name], undo=20)
    assert found.holds, str(found)
    assert found.undone >= 2
