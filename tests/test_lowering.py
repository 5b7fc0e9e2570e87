# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""nm.lower: passes that keep zeros and values, backends that say what they do, and refusals that come before anything else."""

import collections
import copy
import functools
import gc
import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet, Grouped, Matmuls, example
from tensorrt_recorder import Recorder
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.capture.export import capture_mode
from nm_compiler.graph import getattr_path, run, show_graph
from nm_compiler.lowering import cast, passes
from nm_compiler.passes.flatten_tokens import flatten_tokens
from nm_compiler.passes.fold_weights import fold_weights
from nm_compiler.passes.products_to_linear import products_to_linear
from nm_compiler.runtime.backends import cpu as cpu_backend
from nm_compiler.runtime.native.library import load
from nm_compiler.runtime.products import products

Golden = Callable[[str, str], None]


def frozen(kind: Callable[[], nn.Module], pattern: str = "2:4") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = kind()
    x = example(model)
    return nm.freeze(nm.compile(model, x, pattern=pattern, method=nm.Magnitude())).eval(), x


class Views(nn.Module):
    """Products behind chunks, transposes and scales of weights, and one on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.joint = nn.Parameter(torch.randn(32, 16) / 4)
        self.turned = nn.Parameter(torch.randn(16, 16) / 4)
        self.bias = nn.Parameter(torch.randn(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        one, two = self.joint.chunk(2)
        y = nn.functional.linear(y, one) * torch.sigmoid(nn.functional.linear(y, two))
        y = torch.addmm(self.bias, y.flatten(0, 1), self.turned).view(y.shape)
        return self.head(y @ self.turned)


def views() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Views(), torch.randn(2, 3, 8)
    return nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval(), x


# -- passes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [fold_weights, products_to_linear, flatten_tokens], ids=lambda each: each.__name__)
def test_a_pass_computes_the_same_and_looks_as_read(each: Any, golden: Golden) -> None:
    model, x = views()
    gm, _ = capture_mode(model, (x,), {}, training=False)
    for name, _parameter in model.named_parameters():
        for node in gm.graph.find_nodes(op="get_attr", target=name):
            node.meta["weight"] = name
    expected = gm(x)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = run(gm, [fold_weights, each] if each is products_to_linear else [each])
    torch.testing.assert_close(gm(x)[0], expected)
    golden(f"{each.__name__}_views", show_graph(gm))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is not touched"


@pytest.mark.parametrize("kind", [ConvNet, Attention, Matmuls, Grouped, MLP, Views], ids=lambda kind: kind.__name__)
def test_after_every_pass_constants_are_n_m_along_axis_1_and_the_function_is_the_same(kind: Any) -> None:
    model, x = views() if kind is Views else frozen(kind)
    x = x if isinstance(x, tuple) else (x,)
    lowered = nm.lower(model, x, backend="dense")
    assert lowered.error < 1e-5
    found = lowered.result.products
    assert {product.site.name for product in found} | set(lowered.unread) == set(nm.verify(model).satisfied) - set(
        lowered.dense
    )
    for product in found:
        weight = getattr_path(lowered.run, product.read)
        groups = (weight != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
        assert int(groups.max()) <= 2, product


class Einsums(nn.Module):
    """Attention as it is written with einsums: heads are axes of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.split, self.merge = nn.Parameter(torch.randn(2, 16, 8) / 4), nn.Parameter(torch.randn(2, 8, 16) / 4)
        self.turned, self.experts = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.randn(2, 8, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btd,hdk->bhtk", self.stem(x), self.split)
        h = torch.einsum("bhtk,hkj->bhtj", h, self.experts)  # a product for each head, which is no linear
        y = torch.einsum("bhtk,hkd->btd", h, self.merge)
        return self.head(torch.einsum("oi,bti->bto", self.turned.t(), y))


def test_einsums_of_one_weight_are_linears_and_those_of_experts_stay(golden: Golden) -> None:
    model, x = Einsums(), torch.randn(2, 3, 16)
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    assert set(nm.verify(model).satisfied) >= {"split", "merge", "turned", "experts"}
    lowered = nm.lower(model, (x,), backend="dense")
    golden("einsum_to_linear", show_graph(lowered.run))
    assert {product.site.name for product in lowered.result.products} == {"split", "merge", "turned"}
    assert lowered.unread == {
        "experts": "read by einsum, for which no runtime here has sparse kernels: "
        "write the product as a linear, of experts as one for each"
    }
    for batch in (1, 2, 5):
        given = torch.randn(batch, 3, 16)
        torch.testing.assert_close(lowered(given), model(given))


class Biases(nn.Module):
    """Products whose bias is not a constant of one number an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.conv, self.one = nn.Conv2d(16, 16, 3), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.first.weight, x.mean((0, 1)))
        y = nn.functional.linear(y, self.second.weight, self.one)
        y = nn.functional.linear(y, self.third.weight, y[0])  # of one image: a row a token
        return nn.functional.conv2d(y.mT.unflatten(-1, (3, 3)), self.conv.weight, y.mean((0, 1)), padding=1)


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_bias_of_data_or_one_for_all_outputs_is_added_behind_its_product(backend: str) -> None:
    model, x = Biases(), torch.randn(2, 9, 16)
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude(), include=["*"])).eval()
    lowered = nm.lower(model, (x,), backend=backend, force=["*"])
    assert len(lowered.result.products) == 4
    for batch in (1, 2, 5):
        given = torch.randn(batch, 9, 16)
        torch.testing.assert_close(lowered(given), model(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["dense", "auto"])
def test_sequences_of_no_tokens_run_where_batch_and_length_are_both_free(backend: str) -> None:
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), torch.randn(2, 3, 16)
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    free = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    lowered = nm.lower(model, (x,), backend=backend, dynamic_shapes=free)
    for batch, length in ((2, 0), (0, 3), (0, 0), (5, 7)):
        given = torch.randn(batch, length, 16)
        torch.testing.assert_close(lowered(given), model(given))


def test_a_convolution_that_is_called_with_several_batch_norms_is_folded_with_each() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.stem(x)
            return [self.out(norm(self.conv(x))) for norm in self.norms]

    model, x = Levels(), torch.randn(2, 3, 6, 6)
    for norm in model.norms:
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    lowered = nm.lower(model, (x,), force=["*"])
    assert not [node for node in lowered.run.graph.nodes if "batch_norm" in str(node.target)]
    for found, wanted in zip(lowered(x), model(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_weights_whose_names_differ_in_a_dot_alone_stay_apart() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out = nn.Linear(16, 16), nn.Linear(16, 4)
            self.proj, self.proj_0 = nn.ParameterList([torch.randn(16, 16)]), nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.stem(x) @ self.proj[0]) @ self.proj_0)

    model, x = Named(), torch.randn(2, 16)
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    torch.testing.assert_close(nm.lower(model, (x,), force=["*"])(x), model(x), rtol=1e-4, atol=1e-4)


def test_batch_norms_are_folded_before_rounding_so_that_half_precision_loses_no_more_than_it_must() -> None:
    torch.manual_seed(0)
    model = ConvNet(channels=16)
    with torch.no_grad():
        model.norm1.running_var.fill_(1e-3)
        model.norm1.running_mean.normal_()
    x = example(model)
    model = nm.freeze(nm.compile(model, x, method=nm.Magnitude())).eval()
    twin = cast(model, torch.float16)
    scale = (model.norm1.weight / (model.norm1.running_var + model.norm1.eps).sqrt()).detach().double()
    wanted = model.conv1.weight.detach().double() * scale.view(-1, 1, 1, 1)
    errors = []
    for exact in ({}, {**dict(model.named_parameters()), **dict(model.named_buffers())}):
        gm, _ = capture_mode(twin, (x.half(),), {}, training=False)
        gm = run(gm, passes(exact))
        assert not any("batch_norm" in str(node.target) for node in gm.graph.nodes)
        folded = gm.__dict__["extras"]["conv1_weight_folded"]
        assert folded.dtype == torch.float16
        errors.append(float(((folded.double() - wanted).abs() / wanted.abs().clamp_min(1e-3)).max()))
    assert errors[1] <= 2**-11, "rounded once"
    assert errors[0] > errors[1]


def test_a_cast_copy_shares_nothing_with_the_model_and_keeps_ties() -> None:
    model = Attention()
    twin = cast(model, torch.bfloat16)
    assert twin.head.weight is twin.embed.weight
    assert all(p.dtype == torch.bfloat16 for p in twin.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(nm.NMError, match="8-bit needs scales"):
        cast(model, torch.int8)


# -- memory -----------------------------------------------------------------------------------------------------------------


def held() -> dict[int, int]:
    """Bytes of every storage that a live tensor has, by its address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and type(each) in (Tensor, nn.Parameter)]
    storages = [each.untyped_storage() for each in tensors if each.layout == torch.strided and each.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}


@pytest.mark.parametrize(
    ("kind", "dtype", "models"),
    [
        (MLP, None, 0.0),  # shared with the model
        (functools.partial(ConvNet, channels=64), None, 0.0),  # folded weights are not computed before the check is over
        (
            functools.partial(ConvNet, channels=64),
            torch.float16,
            0.1,
        ),  # and the cast ones that they replace are let go by then
        (functools.partial(Matmuls), torch.float16, 0.5),  # transposed, the cast one let go
    ],
    ids=["MLP", "ConvNet", "ConvNet float16", "Matmuls float16"],
)
def test_when_the_check_runs_no_weight_is_there_twice(
    kind: Any, dtype: Any, models: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nm_compiler.lowering as lowering

    model, x = frozen(kind)
    small = 1 << 10
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    before, during = held(), dict[int, int]()
    monkeypatch.setattr(lowering, "_check", lambda *_: during.update(held()))
    lowered = nm.lower(model, x, backend="dense", dtype=dtype)
    new = sum(size for place, size in during.items() if place not in before)
    assert new <= models * own + small * (len(lowered.run.state_dict()) + 8), (new, own)


def test_a_cast_that_changes_no_dtype_shares_the_models_weights_and_folding_leaves_them_alone() -> None:
    model, x = frozen(ConvNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lowered = nm.lower(model, x, backend="dense", dtype=torch.float32)
    assert any("folded" in name for name in lowered.run.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = nm.lower(model, x, backend="dense", dtype=torch.float16)
    assert again.error < 1e-2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- the module that comes back ---------------------------------------------------------------------------------------------


def test_a_lowered_model_takes_other_batches_keeps_its_state_dict_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model, _ = frozen(ConvNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lowered = nm.lower(model, example(model), backend="dense")
    wanted = [model(example(model, batch=size, seed=size)) for size in (1, 5)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for size, expected in zip((1, 5), wanted, strict=True):
        torch.testing.assert_close(lowered(example(model, batch=size, seed=size)), expected)
    torch.save(lowered.state_dict(), tmp_path / "state.pt")
    again = nm.lower(frozen(ConvNet)[0], example(model), backend="dense")
    with torch.no_grad():
        for value in again.state_dict().values():
            value.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(again(example(model, batch=5, seed=5)), wanted[1])
    assert not again.train().training
    with pytest.raises(nm.NMError, match="axes"):
        lowered(torch.randn(3, 8))


@dataclass
class Config:
    """What a pipeline asks its network for."""

    size: int
    names: tuple[str, ...]


class Configured(MLP):
    """With what libraries keep on their models: a config behind a property, sizes, names and a tensor."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self._internal, self.classes, self.means, self.own = Config(8, ("a", "b")), 4, torch.ones(3), lambda: 3

    @property
    def config(self) -> Config:
        return self._internal

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_a_lowered_model_has_the_plain_attributes_that_callers_read_of_the_model(backend: str) -> None:
    model, x = frozen(Configured)
    lowered = nm.lower(model, x, backend=backend)
    saved = copy.deepcopy(lowered)
    for each in (lowered, saved):
        assert each.config == model.config
        assert (each.classes, each.main_input_name, each.device) == (4, "x", torch.device("cpu"))
        for name in ("means", "own", "fc1"):  # a tensor, a function and a layer are the model's own
            with pytest.raises(AttributeError, match=f"a lowered Configured has no attribute '{name}': only forward"):
                getattr(each, name)
    assert saved.config is not model.config


def test_lowering_leaves_the_mode_of_every_layer_as_it_was() -> None:
    model, x = frozen(ConvNet)
    model.train()
    model.norm1.eval()  # deliberately: train() of the whole model would undo it
    modes = [module.training for module in model.modules()]
    nm.lower(model, x, backend="dense")
    assert [module.training for module in model.modules()] == modes
    assert not all(modes)


def test_a_call_with_tensors_alone_is_not_taken_apart_and_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = frozen(ConvNet)
    lowered = nm.lower(model, x, backend="dense")
    (name,) = lowered.signature.arg_names
    by_name = lowered(**{name: x})
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils._pytree.tree_flatten", None)
        assert torch.equal(lowered(x), by_name)
    assert torch.equal(pickle.loads(pickle.dumps(lowered))(x), by_name)
    for wrong in (x.long(), x[0], [x]):
        with pytest.raises(nm.NMError, match="does not fit the captured graph"):
            lowered(wrong)


def test_a_call_that_does_not_fit_says_how_the_model_is_lowered_for_it() -> None:
    model, x = frozen(ConvNet)
    lowered = nm.lower(model, x, backend="dense")
    with pytest.raises(
        nm.NMError, match=r"has size \d+ on axis 2.*\n(.*\n)+Lower the model with example inputs like this call"
    ) as e:
        lowered(torch.cat([x, x], 2))
    assert "nm.compile" not in str(e.value), "which takes no part in it"


def test_a_lowered_model_takes_keywords_and_gives_back_the_structure_of_the_models_outputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP()

        def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
            y = self.net(x) * scale
            return {"logits": y if mask is None else y * mask, "pair": (y.sum(), y.amax())}

    torch.manual_seed(0)
    model, x = Named(), torch.randn(3, 8)
    kwargs = {"scale": 2.0, "mask": torch.ones(3, 4)}
    model = nm.freeze(nm.compile(model, (x,), kwargs, method=nm.Magnitude())).eval()
    lowered = nm.lower(model, (x,), kwargs, backend="dense", dtype=torch.bfloat16)
    found, wanted = lowered(x, **kwargs), model(x, **kwargs)
    assert found["logits"].dtype == torch.bfloat16
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found["pair"][1].float(), wanted["pair"][1], rtol=0.05, atol=0.05)


def test_a_model_whose_weights_are_n_m_without_having_been_compiled_can_be_lowered() -> None:
    model, x = MLP().eval(), torch.randn(3, 8)
    with torch.no_grad():
        model.fc2.weight.view(-1, 4)[:, 2:] = 0
    lowered = nm.lower(model, x, backend="dense")
    assert list(lowered.sites) == ["fc2.weight"]
    assert lowered.dense["fc1.weight"].startswith("not 2:4: a group of 4 along axis 1 has")


# -- the report -------------------------------------------------------------------------------------------------------------


def test_the_report_has_a_row_for_every_weight_with_a_reason_and_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = views()
    monkeypatch.setattr(cpu_backend, "load", lambda: "the CPU kernels were not built")
    lowered = nm.lower(model, (x,), backend="auto")
    report = nm.report(lowered)
    assert [row.name for row in report.rows] == [
        "joint", "joint [1]", "turned", "turned [1]", "stem.weight", "head.weight",
    ]  # fmt: skip
    by_name = {row.name: row for row in report.rows}
    assert by_name["turned"].status == "dense"
    assert by_name["turned"].reason == "no CPU kernels here"
    assert by_name["turned"].hint == "what the notes say about the CPU kernels, or an NVIDIA GPU"
    assert by_name["turned"].bytes == 16 * 16 * 4
    assert by_name["head.weight"].reason.startswith("not 2:4")
    text = str(report)
    assert "Not used, cpu: the CPU kernels were not built" in text
    assert "Checked against the model" in text
    json.dumps(report.to_dict())
    assert "<table>" in report.to_html()


def test_a_weight_of_several_products_has_a_row_for_each_is_counted_once_and_the_report_says_so() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.stem(x))
            for _ in range(3):
                y = torch.relu(self.layer(y))
            return self.head(y)

    torch.manual_seed(0)
    model = nm.freeze(nm.compile(Looped(), torch.randn(2, 8), method=nm.Magnitude())).eval()
    report = nm.report(nm.lower(model, torch.randn(2, 8), backend="dense"))
    assert [row.name for row in report.rows] == [
        "stem.weight", "layer.weight", "layer.weight [1]", "layer.weight [2]", "head.weight",
    ]  # fmt: skip
    assert report.totals["weights"] == 3
    assert report.totals["parameters"] == 8 * 16 + 16 * 16 + 16 * 4
    said = "[1], [2], .. are of the same tensor, read by several products: layer.weight by 3."
    assert said in str(report)
    assert said in report.to_html()
    assert "same tensor" not in str(nm.report(nm.lower(frozen(ConvNet)[0], example(ConvNet()), backend="dense")))


def test_slices_and_other_shapes_of_a_weight_are_one_tensor_in_the_totals() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.cross = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)
            self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(self.stem(x))
            y = self.cross(self.stem(x), y, y)[0].transpose(1, 2)
            return self.head(nn.functional.conv1d(y, self.layer.weight.unsqueeze(2)).transpose(1, 2))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    model = nm.freeze(nm.compile(Crossed(), x, method=nm.Magnitude())).eval()
    report = nm.report(nm.lower(model, x, backend="dense"))
    assert {"cross.in_proj_weight", "cross.in_proj_weight [1]", "layer.weight [1]"} <= {row.name for row in report.rows}
    assert report.totals["weights"] == report.totals["sparse"] + report.totals["dense"] == 5
    assert report.totals["parameters"] == 8 * 16 + 48 * 16 + 16 * 16 + 16 * 16 + 16 * 4


def test_the_report_draws_times_where_both_ways_were_measured() -> None:
    from nm_compiler.runtime.report import Report, Row

    fast = Row("a", "linear", (64, 64), "2:4", "sparse", "cuSPARSELt", dense_ms=2.0, sparse_ms=1.25, bytes=100)
    slow = Row("b", "linear", (64, 64), "2:4", "dense", "slower", dense_ms=1.0, sparse_ms=4.0, bytes=200, hint="more tokens")
    report = Report("m", (fast, slow))
    assert fast.speedup == 1.6
    assert report.totals["dense_ms"] == 3.0
    assert report.totals["ms"] == 2.25, "what was chosen: sparse for a, dense for b"
    assert report.totals["bytes"] == 300
    assert "3 ms dense, 2.25 ms as chosen" in str(report)
    assert re.search(r"^a .*sparse +2\.000 +1\.250 +1\.60x  cuSPARSELt$", str(report), re.M)
    assert "What would help b: more tokens." in str(report)
    assert str(report).count("more tokens") == 1, "said once, below the table"
    page = report.to_html()
    assert page.count("<i ") == 4
    assert "width:100.0%" in page
    assert json.loads(json.dumps(report.to_dict()))["weights"][0]["speedup"] == 1.6


def test_the_magnitude_that_is_retained_is_of_the_weights_that_say_so() -> None:
    """As of a plain module that holds a compiled one: a weight that was frozen before knows nothing of it."""
    from nm_compiler.runtime.report import Report, Row

    rows = [Row(name, "linear", (4, 4), "2:4", "sparse", "", retained=kept) for name, kept in (("a", 0.5), ("b", None))]
    assert Report("Net", tuple(rows)).totals["retained"] == 0.5


def test_a_way_out_that_has_a_column_of_its_own_is_not_said_twice() -> None:
    from nm_compiler.runtime.report import Report, Row

    row = Row("a", "conv3d", (8, 8, 3, 3, 3), "2:4", "dense", "three axes: write it as a linear", hint="write it as a linear")
    for text in (str(Report("m", (row,))), Report("m", (row,)).to_html()):
        assert text.count("write it as a linear") == 1
        assert "three axes" in text
    assert row.to_dict()["reason"] == "three axes: write it as a linear"


def test_a_report_with_a_dense_weight_does_not_say_that_all_are_sparse() -> None:
    from nm_compiler.runtime.report import Report, Row

    large, small = (
        Row("large", "linear", (1000, 1000), "2:4", "sparse", ""),
        Row("small", "linear", (10, 10), None, "dense", ""),
    )
    assert "1 of 2 tensors are sparse (more than 99% of 1,000,100 weights)." in str(Report("m", (large, small)))
    assert "(100% of 1,000,000 weights)" in str(Report("m", (large,)))
    seldom = replace(small, status="sparse"), replace(large, status="dense")
    assert "(less than 1% of 1,000,100 weights)" in str(Report("m", seldom))
    assert "(0% of 100 weights)" in str(Report("m", (small,)))


def test_a_page_says_what_its_columns_mean() -> None:
    from nm_compiler.runtime.report import Report, Row

    page = Report("m", (Row("a", "linear", (8, 8), "2:4", "sparse", "", retained=0.7, live=1.0),)).to_html()
    assert '<th class=number title="combinations a group can still choose from; 1 is decided">live</th>' in page
    assert ">retained</th>" in page
    assert "<th>weight</th>" in page


def test_a_hint_that_many_weights_share_is_said_once_with_the_first_of_them() -> None:
    from nm_compiler.runtime.report import Report, Row

    rows = tuple(Row(f"w{i}", "linear", (8, 8), "2:4", "dense", "slower", hint="a larger batch") for i in range(5))
    assert "What would help w0, w1, w2 and 2 more: a larger batch." in str(Report("m", rows))
    assert max(map(len, str(Report("m", rows)).splitlines())) < 80
    assert Report("m", rows).to_html().count("a larger batch") == 5, "a page has room for a column"


def test_a_report_written_to_a_file_is_a_whole_document_and_part_of_one_otherwise() -> None:
    from nm_compiler.runtime.report import Report, Row

    report = Report("m & n", (Row("größe", "linear", (8, 8), None, "dense", "slower"),))
    assert report.to_page().startswith("<!doctype html>")
    assert '<meta charset="utf-8">' in report.to_page()
    assert "<title>m &amp; n</title>" in report.to_page()
    assert report.to_html() in report.to_page()
    assert "<!doctype" not in report.to_html()


# -- onnx -------------------------------------------------------------------------------------------------------------------


@pytest.mark.required
def test_onnx_writes_a_file_whose_zeros_and_numbers_were_checked_and_a_report_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'nm_compiler[onnx]'")
    model, x = views()
    path = tmp_path / "model.onnx"
    lowered = nm.lower(model, (x,), backend="onnx", options={"path": path})
    assert dict(nm.verify(path).satisfied) == {"joint": (1,), "joint[1]": (1,), "turned": (1,)}, (
        "a shared constant is there once"
    )
    assert "trtexec" in str(nm.report(lowered))
    side = json.loads((tmp_path / "model.onnx.json").read_text())
    assert side["onnx"]["numerics"]
    assert [row["weight"] for row in side["report"]["products"]] == ["joint", "joint", "turned", "turned"]
    torch.testing.assert_close(lowered(x), model(x))
    with pytest.raises(nm.NMError, match="writes a file"):
        nm.lower(model, (x,), backend="onnx")
    with pytest.raises(nm.NMError, match="has no option 'paths'"):
        nm.lower(model, (x,), backend="onnx", options={"paths": path})


@pytest.mark.ci
@pytest.mark.required
def test_inputs_and_weights_of_a_file_keep_their_names_beside_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install 'nm_compiler[onnx]'")

    class Scaled(MLP):
        def forward(self, data: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
            y = super().forward(data) * scale
            return y if mask is None else y * mask

    torch.manual_seed(0)
    given = {"data": torch.randn(4, 8), "scale": 2.0, "mask": torch.ones(4, 1)}
    model = nm.freeze(nm.compile(Scaled(), kwargs=given, method=nm.Magnitude())).eval()
    lowered = nm.lower(model, kwargs=given, backend="onnx", options={"path": tmp_path / "m.onnx"})
    torch.testing.assert_close(lowered(**given), model(**given))
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [each.name for each in graph.input] == ["data", "mask"]
    assert {name for name, _ in model.named_parameters()} <= {each.name for each in graph.initializer}


class Named(MLP):
    """Gives what ``shape`` makes of its logits, the states before them and a number."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        states = torch.relu(self.fc1(x))
        return self.shape(self.fc3(torch.relu(self.fc2(states))), states)


Pair = collections.namedtuple("Pair", "logits states")


@pytest.mark.ci(here=["[dict]", "[taken]"])
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (lambda y, z: y, ["output"]),
        (lambda y, z: (y, z), ["output_0", "output_1"]),
        (lambda y, z: {"logits": y, "old": [z, 3, z + 1]}, ["logits", "old_0", "old_2"]),
        (lambda y, z: Pair(y, z), ["logits", "states"]),
        (lambda y, z: {"x": y, "fc1.weight": z}, None),  # an input and a weight are called so
    ],
    ids=["tensor", "tuple", "dict", "namedtuple", "taken"],
)
@pytest.mark.required
def test_outputs_of_a_file_are_called_as_in_the_model(shape: Any, names: list[str] | None, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install 'nm_compiler[onnx]'")
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = nm.freeze(nm.compile(Named(shape), (x,), method=nm.Magnitude())).eval()
    lowered = nm.lower(model, (x,), backend="onnx", options={"path": tmp_path / "m.onnx"})
    torch.testing.assert_close(lowered(x), model(x))
    found = [each.name for each in onnx.load(tmp_path / "m.onnx").graph.output]
    assert found == names if names else "x" not in found


# -- tensorrt ---------------------------------------------------------------------------------------------------------------


SAYS = (
    "(Sparsity) Layers eligible for sparse math: [CONVOLUTION]-[aten_ops.conv2d.default]-[conv2d_default_1], "
    "[CONVOLUTION]-[aten_ops.conv2d.default]-[conv2d_2]",
    "(Sparsity) TRT inference plan picked sparse implementation for layers: "
    "[CONVOLUTION]-[aten_ops.conv2d.default]-[conv2d_default_1]",
)


@pytest.mark.parametrize("batch", [None, (1, 2, 8)])
def test_tensorrt_gets_half_precision_constants_that_are_2_of_4_and_its_log_becomes_the_report(
    batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nm_compiler.runtime.backends.tensorrt import TensorRT

    recorder = Recorder(says=SAYS)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", recorder.module)
    monkeypatch.setattr(TensorRT, "missing", lambda self, dtype, device: None)
    model, x = frozen(lambda: ConvNet(channels=16))
    options = {"batch": batch} if batch else {}
    lowered = nm.lower(model, x, backend="tensorrt", dtype=torch.float16, options=options)
    (call,) = recorder.calls
    program = call["exported_program"]
    assert call["sparse_weights"] is True
    weights = {name: value for name, value in program.state_dict.items() if value.ndim > 1}
    assert all(value.dtype == torch.float16 for value in weights.values())
    sparse = [value for value in weights.values() if int((value != 0).sum()) == value.numel() // 2]
    assert len(sparse) == 2
    for value in sparse:
        assert int((value != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2
    report = nm.report(lowered)
    assert {row.name: (row.status, row.eligible) for row in report.rows if row.pattern} == {
        "conv1.weight": ("sparse", True), "conv2.weight": ("dense", True),
    }  # fmt: skip
    assert "TensorRT measured a dense kernel as faster" in str(report)
    assert "TensorRT: 2 layers eligible for sparse kernels, 1 chosen." in str(report)
    assert ("Built for inputs of the examples' sizes only" in str(report)) is (batch is None)


# -- bad input --------------------------------------------------------------------------------------------------------------


@functools.cache
def refusals() -> dict[str, tuple[Callable[[], Any], str]]:
    model, x = frozen(ConvNet)
    sparse = nm.compile(ConvNet(), x, method=nm.SRSTE())
    done = nm.compile(ConvNet(), x, method=nm.SRSTE())
    nm.freeze(done)
    meta = copy.deepcopy(model).to("meta")
    return {
        "still trains": (lambda: nm.lower(sparse, x), r"still trains: model = nm\.freeze\(sparse\) first"),
        "the frozen SparseModule": (lambda: nm.lower(done, x), "lower what nm.freeze returned"),
        "dense": (lambda: nm.lower(ConvNet(), x), "no weight of this ConvNet is 2:4: nothing to lower"),
        "another pattern": (lambda: nm.lower(model, x, pattern="1:4"), "1:4: nothing to lower.*conv1.weight: not 1:4"),
        "no inputs": (lambda: nm.lower(model), "give inputs to capture the model with"),
        "no module": (lambda: nm.lower({}, x), "takes a torch.nn.Module, not dict"),
        "lowered": (
            lambda: nm.lower(nm.lower(model, x, backend="dense"), x),
            "this ConvNet is lowered already, to dense: lower the model that it was made of",
        ),
        "verified when lowered": (
            lambda: nm.verify(nm.lower(model, x, backend="dense")),
            "this ConvNet is lowered to dense.*: verify the model that was lowered",
        ),
        "scripted": (
            lambda: nm.lower(torch.jit.trace(model, x), x),
            r"takes the model that was given to torch\.jit, not what that made of it",
        ),
        "exported": (
            lambda: nm.lower(torch.export.export(model, (x,) if torch.is_tensor(x) else x).module(), x),
            r"takes the model that was given to torch\.export, not what that made of it",
        ),
        "meta": (lambda: nm.lower(meta, x), "on the meta device"),
        "unknown backend": (lambda: nm.lower(model, x, backend="trt"), "backend='trt': choose one of auto, tensorrt"),
        "cpu": (
            lambda: nm.lower(model, x, backend="cpu", dtype=torch.float16),
            "cannot be used here: float16, and the CPU kernels",
        ),
        "cusparselt on a CPU": (lambda: nm.lower(model, x, backend="cusparselt"), "cannot be used here: the weight is on cpu"),
        "tensorrt": (lambda: nm.lower(model, x, backend="tensorrt"), r"backend='tensorrt' cannot be used here: .*pip install"),
        "dtype": (lambda: nm.lower(model, x, dtype=torch.int8), "8-bit needs scales"),
        "glob": (lambda: nm.lower(model, x, exclude=["none*"]), "exclude='none\\*' matches no weight"),
        "forced glob": (lambda: nm.lower(model, x, force="none*"), "force='none\\*' matches no weight"),
        "option": (lambda: nm.lower(model, x, backend="dense", options={"a": 1}), "has no option 'a'"),
    }


@pytest.mark.parametrize("case", [
    "still trains", "the frozen SparseModule", "dense", "another pattern", "no inputs", "no module", "lowered",
    "verified when lowered", "scripted", "exported", "meta", "unknown backend",
    "cpu", "cusparselt on a CPU", "tensorrt", "dtype", "glob", "forced glob", "option",
])  # fmt: skip
def test_lower_explains(case: str) -> None:
    work, message = refusals()[case]
    with pytest.raises(nm.NMError, match=message):
        work()


def test_an_output_of_a_class_that_export_does_not_know_names_the_way_out_and_it_works() -> None:
    @dataclass
    class Result:
        logits: Tensor

    class Returning(MLP):
        def forward(self, x: Tensor) -> Any:
            return Result(super().forward(x))

    model, x = frozen(Returning)
    with pytest.raises(nm.NMError, match=r"(?s)(not a known|unhashable) type.*torch\.export\.register_dataclass"):
        nm.lower(model, x, backend="dense")
    torch.export.register_dataclass(Result)
    torch.testing.assert_close(nm.lower(model, x, backend="dense")(x).logits, model(x).logits)


def test_an_input_of_a_class_that_export_does_not_know_is_shown_by_its_shapes_with_the_way_out_and_it_works() -> None:
    @dataclass
    class Batch:
        data: Tensor
        more: list[Tensor]
        note: str = "n" * 1000

    class Taking(MLP):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch.data) + batch.more[0]

    model, x = Taking(), Batch(torch.randn(2, 8), [torch.ones(4)])
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    shown = r"inputs \(Batch\(data=float32\[2, 8\], more=\[float32\[4\]\], note='n{199}\.\.\.\)\)\n"
    with pytest.raises(nm.NMError, match=rf"(?s){shown}.*torch\.export\.register_dataclass"):
        nm.lower(model, (x,), backend="dense")
    torch.export.register_dataclass(Batch)
    torch.testing.assert_close(nm.lower(model, (x,), backend="dense")(x), model(x))


def test_outputs_that_differ_after_lowering_are_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import nm_compiler.lowering as lowering

    def wrong(gm: Any) -> Any:
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.sigmoid.default
        return gm

    model, x = frozen(ConvNet)
    monkeypatch.setattr(lowering, "passes", lambda exact, own: [wrong])
    with pytest.raises(nm.NMError, match=r"lowered to dense, the outputs differ from the model's by .*exclude=\[\.\.\.\]"):
        nm.lower(model, x, backend="dense")
    assert nm.lower(model, x, backend="dense", check=False).error is None
    model = nn.Sequential(model, Largest())
    ranks = r"exclude=.*check=False if you know better\. forward\(\) ranks what it has computed \(topk\): .* model\.double\(\)"
    with pytest.raises(nm.NMError, match=ranks):
        nm.lower(model, x, backend="dense")


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(2).values


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))


@pytest.mark.ci
def test_the_check_runs_the_model_op_by_op_without_fused_encoders_and_autocast() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 6, 16), torch.arange(6).expand(3, 6) > 3
    model = nm.freeze(nm.compile(Padded(), inputs, method=nm.Magnitude())).eval()
    with torch.no_grad():
        assert not torch.allclose(model(*inputs), nm.lower(model, inputs, backend="dense")(*inputs)), (
            "torch fuses no encoder now"
        )
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = nm.lower(model, inputs, backend="cpu" if not isinstance(load(), str) else "dense", force=["*"])
    torch.testing.assert_close(lowered(*inputs)[:, :4], model(*inputs)[:, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "cpu"])
def test_under_autocast_a_lowered_model_answers_in_the_dtype_of_the_model_or_says_how_to_lower_it(backend: str) -> None:
    if backend == "cpu" and isinstance(load(), str):
        pytest.skip("no C compiler here")
    model, x = frozen(MLP)
    options: Any = {"backend": backend, "force": ["*"] if backend == "cpu" else []}
    plain, cast_one = nm.lower(model, x, **options), nm.lower(model, x, dtype=torch.bfloat16, **options)
    wanted = cast_one(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cast_one(x), wanted, rtol=0, atol=0)
        assert cast_one(x).dtype == model(x).dtype
        if backend == "dense":
            torch.testing.assert_close(plain(x), model(x))
        else:
            with pytest.raises(
                nm.NMError, match=r"lowered for float32, and torch.autocast \(bfloat16\) .*dtype=torch.bfloat16"
            ):
                plain(x)
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(nm.NMError, match=r"for bfloat16, and torch.autocast \(float16\) is on"),
    ):
        cast_one(x)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        plain(x)


def test_products_are_timed_without_the_autocast_around_nm_lower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if isinstance(load(), str):
        pytest.skip("no C compiler here")
    seen, timed = list[bool](), cpu_backend.timed

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return timed(*args, **kwargs)

    monkeypatch.setattr(cpu_backend, "timed", watched)
    model, x = frozen(MLP)
    with torch.autocast("cpu", torch.bfloat16):
        nm.lower(model, x, backend="cpu", options={"cache": tmp_path / "choices.json"})
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("options", [{}, {"values": "int8"}], ids=["float32", "int8"])
def test_a_model_on_the_cpu_is_packed_there_whatever_the_default_device_is(options: dict[str, Any], tmp_path: Path) -> None:
    if isinstance(load(), str):
        pytest.skip("no C compiler here")
    model, x = frozen(MLP)
    with torch.device("meta"):
        forced = nm.lower(model, x, backend="cpu", force=["*"], options=options)
        timed = nm.lower(model, x, backend="cpu", options={**options, "cache": tmp_path / "choices.json"})
        found = forced(x), timed(x)
    for each in found:
        assert float((each - model(x)).norm() / model(x).norm()) <= (1e-1 if options else 1e-5)


def test_a_pass_that_spoils_the_zeros_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import nm_compiler.lowering as lowering

    def spoiling(gm: Any) -> Any:
        for product in products(gm, sites):
            weight = torch.ones(product.site.shape)
            gm.get_submodule(product.read.rpartition(".")[0]).weight = nn.Parameter(weight)
        return gm

    model, x = frozen(ConvNet)
    sites = nm.lower(model, x, backend="dense").sites
    monkeypatch.setattr(lowering, "passes", lambda exact, own: [spoiling])
    with pytest.raises(
        nm.NMError, match=r"after spoiling: conv1\.weight of shape \[8, 8, 3, 3\] has 4 non-zeros in a group of 4"
    ):
        nm.lower(model, x, backend="dense")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_of_another_dtype_are_an_error_that_says_what_to_cast(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16)
    model = nm.freeze(nm.compile(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), x, method=nm.Magnitude()))
    lowered = nm.lower(model, x, backend="dense")
    with pytest.raises(
        nm.NMError, match=r"lowered for float32, and its inputs are \w*float\d+: cast them, x.to\(torch.float32\)"
    ):
        lowered(x.to(dtype))
    assert nm.lower(model, x, backend="dense", dtype=torch.float32)(x.to(dtype)).dtype == torch.float32


def test_a_model_whose_outputs_have_other_sizes_at_every_call_is_told_what_to_say() -> None:
    calls = []

    class Speaking(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape)
            return super().forward(x).repeat(1, len(calls))

    x = torch.randn(4, 16)
    model = nm.freeze(nm.compile(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), x, method=nm.Magnitude())).eval()
    with pytest.raises(nm.NMError, match=r"an output has sizes \[4, \d+\], and the model's has \[4, \d+\]: .* check=False"):
        nm.lower(Speaking(*model.children()), (x,), backend="dense")


def test_a_model_that_computes_nan_by_itself_is_told_so() -> None:
    model, x = frozen(MLP)
    with torch.no_grad():
        model.fc3.bias[0] = torch.nan
    with pytest.raises(nm.NMError, match="the model itself, before it is lowered to dense, has outputs that are not finite"):
        nm.lower(model, x, backend="dense")
    nm.lower(model, x, backend="dense", check=False)
