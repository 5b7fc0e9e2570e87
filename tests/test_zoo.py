"""A sample of the zoo and every awkward model: captured in both modes, equal to the bit, with weights to make sparse.

Each model is a test of its own, so that workers share them. The whole zoo is measured by ``benchmarks/coverage.py``.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from awkward import AWKWARD
from live_reach import train
from reach import axes_row
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo.shim import declare_missing_operators
from zoo.shrink import cut

from nm_compiler.capture.export import capture, in_mode
from nm_compiler.errors import NMError
from nm_compiler.law import permutation_law
from nm_compiler.pattern import PatternMap
from nm_compiler.sites.plan import find

SAMPLE = {
    "torchvision": "alexnet regnet_x_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1",
    "timm": "byobnet convmixer deit efficientnet mlp_mixer resnetv2 vision_transformer",
    "transformers": "albert bart bert clip distilbert falcon gpt2 llama mamba mixtral opt resnet vit",
}
NOT_ONE_GRAPH = {
    "branch_on_data": "a branch on values in both modes",
    "branch_in_training": "a branch on a random number in training",
    "returns_unregistered": "the output hides its tensors from pytree",
}
"""Models that no single exported graph holds."""
SLOW = {
    "alexnet",
    "opt",
    "falcon",
    "distilbert",
    "albert",
    "bart",
    "clip",
    "deit",
    "regnet_x_400mf",
    "resnet",
    "resnetv2",
    "shufflenet_v2_x0_5",
    "vit",
}
"""Near relatives of others in the sample: --slow runs them."""
PINNED = {
    "keywords": ["head.weight[1]"],  # the hidden state is an output too
    "nested_containers": ["head.weight[1]"],
    "lstm_cell": ["head.weight[1]"],  # a fused cell has no rule
    "token_mixing": ["tokens[1]"],  # it reduces over the positions of the input, and so does the next
    "mlp_mixer": ["blocks.0.mlp_channels.gate.proj.weight[1]", "blocks.1.mlp_channels.gate.proj.weight[1]"],
}
"""Input axes of weights, stems left out, that cannot be permuted."""


def entry(library: str, name: str) -> zoo.Entry:
    declare_missing_operators()
    pytest.importorskip(library, reason="the zoo is an extra: pip install -e '.[zoo]'", exc_type=ImportError)
    return next(entry for entry in zoo.entries(library) if entry.name == name)


def check(entry: zoo.Entry) -> None:
    """Everything that has to hold for a captured model."""
    model, args, kwargs = zoo.seeded(entry.small)
    given = kwargs
    captured = capture(model, args, kwargs)
    assert set(captured) == {False, True}
    graph, signature = captured[False]
    kwargs = {**kwargs, **signature.hidden}
    with in_mode(model, False):  # with gradients: without, attention takes a fused path that rounds differently
        expected = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        found = [leaf for leaf in pytree.tree_leaves(graph(*pytree.tree_leaves((args, kwargs)))) if isinstance(leaf, Tensor)]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert find(model, [graph, captured[True][0]], PatternMap.parse("2:4")).sites
    assert axes_row(entry, model, captured)["pinned_inputs"] == PINNED.get(entry.name, [])
    law = permutation_law(model, args, given, outputs=entry.outputs, undo=5)
    assert law.holds, law


@pytest.mark.ci(here=["squeezenet1_1", "vision_transformer"])
@pytest.mark.required
@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=pytest.mark.slow if name in SLOW else ())
        for library, names in SAMPLE.items()
        for name in names.split()
    ],
)
def test_a_model_of_the_zoo_is_captured_in_both_modes_and_computes_the_same_to_the_bit(library: str, name: str) -> None:
    check(entry(library, name))


@pytest.mark.ci(
    here=["shared_weight", "in_place", "branch_on_data", "returns_dataclass", "[experts]", "conv1d", "computed_weight"]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(raises=NMError, reason=NOT_ONE_GRAPH[name]))
        if name in NOT_ONE_GRAPH
        else name
        for name in AWKWARD
    ],
)
def test_an_awkward_model_is_captured_in_both_modes_and_computes_the_same_to_the_bit(name: str) -> None:
    check(zoo.Entry("awkward", name, AWKWARD[name], AWKWARD[name]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LBC", "BiMask"])
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet18"),
        *(
            ("transformers", name)
            for name in ["bert", "bigbird_pegasus", "gpt2", "hubert", "llama", "longformer", "mamba", "mixtral"]
        ),
    ],
)
def test_a_live_model_of_the_zoo_trains_with_every_planned_weight_sparse(library: str, name: str, method: str) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(use_numpy_random_stream=True):
        row = {key: value for part in train(entry(library, name), method=method, then="eager") for key, value in part.items()}
    assert row["planned"]
    assert row["difference"] < 1e-5


def test_cutting_a_model_keeps_two_of_equal_blocks_and_all_others() -> None:
    def width(size: int) -> nn.Linear:
        return nn.Linear(8, size)

    layers = nn.Sequential(width(8), nn.ReLU(), nn.ReLU(), nn.ReLU(), *(width(8) for _ in range(5)), width(4))
    kept = [getattr(layer, "out_features", 0) for layer in cut(layers).children()]
    assert kept == [8, 0, 0, 0, 8, 8, 4]


@pytest.mark.required
def test_the_zoo_holds_what_it_says_and_no_name_twice() -> None:
    declare_missing_operators()
    pytest.importorskip("torchvision", reason="the zoo is an extra: pip install -e '.[zoo]'")
    listed = [str(entry) for entry in zoo.entries()]
    assert len(set(listed)) == len(listed)
    counted = Counter(name.partition("/")[0] for name in listed)
    assert counted["torchvision"] == 80
    assert counted["timm"] == 98
    assert counted["transformers"] >= 150
    assert len(AWKWARD) >= 25
