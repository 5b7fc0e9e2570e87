# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""What a user can get wrong: an NMError that names the layer, the shape and the way out, and a model left untouched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, example
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import nm_compiler as nm
from nm_compiler.errors import Refusal, WayOut, refuse_all


class Quantised(nn.Module):
    """An integer weight, dequantised in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) @ self.weight.to(x.dtype))


def with_value(value: float) -> nn.Module:
    model = MLP()
    with torch.no_grad():
        model.fc2.weight[3, 5] = value
    return model


def clashing() -> nn.Module:
    model = MLP()
    model.fc2.register_buffer("weight_live", torch.zeros(1))
    return model


def on_two_devices() -> nn.Module:
    model = MLP()
    model.fc2.to("meta")
    return model


def with_inner_tensors() -> nn.Module:
    """A tensor subclass that holds its values in other tensors, as quantised weights do."""
    model = MLP()
    weight = model.fc2.weight.detach()
    model.fc2.weight = nn.Parameter(TwoTensor(weight, weight))
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "a swapped pattern": (MLP, {"pattern": "4:2"}, "did you mean '2:4'"),
    "a pattern that is no pattern": (MLP, {"pattern": "2:x"}, "'2:x' is not a pattern: write N:M"),
    "M larger than every layer": (MLP, {"pattern": "2:64"}, r"no weight of this MLP can be 2:64[\s\S]*fc2.weight \[16, 16\]: 16 input features, groups of 2:64 need a multiple of 64"),
    "no eligible weight": (lambda: nn.Linear(8, 8), {}, r"no weight[\s\S]*weight \[8, 8\]: stem[\s\S]*include="),
    "a model without weights": (nn.Tanh, {}, "it has no weights"),
    "NaN in a weight": (lambda: with_value(float("nan")), {}, r"fc2.weight of shape \[16, 16\] has 1 NaN or infinite"),
    "an infinite weight": (lambda: with_value(float("-inf")), {}, r"fc2.weight of shape \[16, 16\] has 1 NaN or infinite"),
    "an integer weight asked for": (Quantised, {"include": "weight"}, r"weight of shape \[8, 8\] is torch.int8 but include='weight'"),
    "some weights on the meta device": (lambda: on_two_devices(), {}, r"fc1.weight is on cpu, fc2.weight of shape \[16, 16\] on meta .*has no values.*to_empty"),
    "a quantised weight": (lambda: with_inner_tensors(), {}, r"fc2.weight of shape \[16, 16\] is a TwoTensor, quantised already: .*quantise it afterwards"),
    "an include that matches nothing": (MLP, {"include": "layer9.*"}, r"include='layer9.\*' matches no weight; .* such as fc1.weight"),
    "an exclude that matches nothing": (MLP, {"exclude": ["fc1*", "fx2*"]}, r"exclude='fx2\*' matches no weight"),
    "an exclude that is no glob": (MLP, {"exclude": 3}, r"3 is no glob: include=, exclude= .*'layer4.\*'"),
    "a seed that is no number": (MLP, {"seed": "a"}, "seed='a': needs a whole number"),
    "everything excluded": (MLP, {"exclude": "*"}, r"no weight[\s\S]*excluded by '\*'\ntake a glob out of exclude=\[\.\.\.\]$"),
    "an unknown method": (MLP, {"method": "lbc"}, r"method='lbc': choose nm.LBC\(\)"),
    "scores for every one of 12870 combinations": (lambda: MLP(16), {"pattern": "8:16", "method": nm.LBC(scores="combination"), "include": "fc2*"},
                                                   r"fc2.weight of shape \[16, 16\]: 8:16 has 12870 combinations.*use scores='position'"),
    "a name the method needs, taken": (clashing, {"method": nm.LBC()}, "attribute 'fc2.weight_live' of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_compile_explains(case: str) -> None:
    make, options, message = CASES[case]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(nm.NMError, match=message):
        nm.compile(model, torch.randn(2, 8), **options)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == before.keys()
    assert all(
        value.is_meta or torch.equal(value.nan_to_num(), before[name].nan_to_num())
        for name, value in model.state_dict().items()
    )
    assert model.training


def test_an_integer_weight_not_asked_for_is_a_line_of_the_report() -> None:
    rows = {row.name: row.reason for row in nm.report(nm.compile(Quantised(), torch.randn(2, 8), include="fc1*")).rows}
    assert rows["weight"] == "not floating point (torch.int8): dequantise it to make it sparse"


def test_compiling_twice_is_refused_for_the_result_the_model_and_a_model_around_it() -> None:
    model = MLP()
    sparse = nm.compile(model, example(model))
    for again in (sparse, model, nn.Sequential(nn.Linear(8, 8), model)):
        with pytest.raises(nm.NMError, match="compiled already"):
            nm.compile(again, example(model))
    assert sparse(example(model)).shape == (2, 4)


def test_inputs_that_are_no_tuple_and_options_without_their_name_are_told_so() -> None:
    x = torch.randn(2, 8)
    for call in (lambda: nm.compile(MLP(), x, x), lambda: nm.permute(MLP(), (x,), "random"), lambda: nm.lower(MLP(), x, x)):
        with pytest.raises(nm.NMError, match=r"kwargs is a (Tensor|str), .* go into one tuple, \(x, y\)"):
            call()


def test_without_example_inputs_the_way_to_give_them_is_shown() -> None:
    with pytest.raises(nm.NMError, match=r"give inputs to capture the model with, such as \(x,\)"):
        nm.permute(MLP(), None)


def test_models_that_share_a_compiled_submodule_are_refused_so_that_freezing_one_cannot_break_the_other() -> None:
    backbone = MLP()
    nm.compile(nn.Sequential(nn.Linear(8, 8), backbone), torch.randn(2, 8), method=nm.SRSTE())
    for other in (backbone, nn.Sequential(backbone, nn.Linear(4, 4))):
        with pytest.raises(nm.NMError, match="compiled already"):
            nm.compile(other, torch.randn(2, 8))


def test_lazy_layers_and_method_classes_get_a_hint() -> None:
    with pytest.raises(nm.NMError, match="has no shape yet .* run one batch"):
        nm.compile(nn.Sequential(nn.LazyLinear(8)), torch.randn(2, 8))
    with pytest.raises(nm.NMError, match=r"did you mean nm.LBC\(\)"):
        nm.compile(MLP(), torch.randn(2, 8), method=nm.LBC)


def test_a_pattern_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(nm.NMError, match=r"pattern=\{'layer9.\*': '1:4'\} matches no weight"):
        nm.compile(MLP(), torch.randn(2, 8), pattern={"layer9.*": "1:4", "*": "2:4"})


def test_a_submodule_named_like_an_attribute_of_graphs_is_refused_by_name() -> None:
    model = nn.Module()
    model.graph = nn.Linear(8, 8)
    model.forward = lambda x: model.graph(x)
    with pytest.raises(nm.NMError, match="graph has a name that graphs use themselves: rename it"):
        nm.compile(model, torch.randn(2, 8))


def test_a_wrapped_model_is_to_be_compiled_first() -> None:
    with pytest.raises(nm.NMError, match="compile the model itself, then wrap the result"):
        nm.compile(torch.compile(MLP()), torch.randn(2, 8))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(nm.NMError, match="takes a torch.nn.Module, not function"):
        nm.compile(lambda x: x, torch.randn(2, 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nm.LBC(scores="group"),
        lambda: nm.LBC(t_i=0.5, t_f=0.5), lambda: nm.LBC(t_i=-0.1), lambda: nm.LBC(t_f=1.1),
        lambda: nm.BiMask(interval=0), lambda: nm.BiMask(decay=-1.0), lambda: nm.BiMask(decay=float("nan")),
        lambda: nm.BiMask(moves=-1), lambda: nm.BiMask(interval=2.5), lambda: nm.LBC(t_f="x"), lambda: nm.SRSTE(decay=None), lambda: nm.BiMask(objective="l2"),
        lambda: nm.SRSTE(decay=float("inf")),
    ],
)  # fmt: skip
def test_options_out_of_range_cannot_be_built(make: Callable[[], object]) -> None:
    with pytest.raises(nm.NMError):
        make()


def test_functions_that_need_a_compiled_model_say_so() -> None:
    for call in (nm.freeze, nm.show):
        with pytest.raises(nm.NMError, match=r"ConvNet is not a compiled model: call nm.compile"):
            call(ConvNet())


def test_sharded_weights_are_to_be_compiled_first() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = MLP()
        model.fc2.weight = nn.Parameter(
            distribute_tensor(model.fc2.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
        )
        with pytest.raises(
            nm.NMError, match=r"fc2.weight of shape \[16, 16\] is a DTensor, sharded already: nm.compile the whole"
        ):
            nm.compile(model, torch.randn(2, 8))
    finally:
        torch.distributed.destroy_process_group()


class Tied(nn.Module):
    """A table of words that is the output layer as well, and a size of it written into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        return (self.fc(self.table(words)) @ self.table.weight.T).view(-1, self.table.num_embeddings)


def test_a_parameter_that_was_resized_after_compile_is_named_with_both_shapes() -> None:
    model, words = Tied(), torch.randint(12, (2, 5))
    sparse = nm.compile(model, words, method=nm.SRSTE(), include="fc*")
    model.table.weight.data = torch.randn(13, 8)
    with pytest.raises(nm.NMError, match=r"table.weight has shape \[13, 8\], .* with \[12, 8\]: resize it .* nm.freeze"):
        sparse(words)


class Wrapped(nn.Module):
    """What returns a cache that no pytree knows, and says so as torch.export does."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("Found <class 'transformers.cache_utils.DynamicCache'> in output, which is not a known type")


def test_a_cache_that_comes_out_of_a_wrapped_model_is_an_error_that_says_use_cache() -> None:
    with pytest.raises(nm.NMError, match=r"Pass use_cache=False, or set config\.use_cache = False"):
        nm.lower(Wrapped(), torch.randn(2, 8), backend="dense")


def test_the_ways_out_of_an_error_come_from_its_refusals_and_not_from_their_words() -> None:
    refusals = [Refusal("a", "in other words", WayOut.PATTERN), Refusal("b", "its output is excluded by an axis")]
    with pytest.raises(nm.NMError) as error:
        refuse_all(MLP(), "2:4", refusals, {"a": (4, 6), "b": (4, 4)})
    assert str(error.value).endswith("by an axis\nchoose a pattern whose M divides the input channels")
