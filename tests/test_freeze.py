# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""freeze gives the user's own module back; verify and report tell what is in it."""

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, Grouped, Matmuls, example
from safetensors.torch import save_file
from torch import nn
from torch.fx import GraphModule, Node

import nm_compiler as nm

METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(), nm.SRSTE(), nm.Magnitude()]


def trained(kind: type[nn.Module], method: Any, pattern: Any = "2:4", steps: int = 6) -> tuple[nm.SparseModule, Any]:
    model = kind()
    sparse = nm.compile(model, example(model), method=method, pattern=pattern)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    scheduler = nm.SparsityScheduler(sparse, total_steps=steps)
    for step in range(steps):
        sparse(example(model, batch=4, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return sparse, model


@pytest.mark.ci(here=["2:4-LBC(scores='position'", "2:4-SRSTE"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_the_users_own_module_comes_back_with_exact_zeros_and_the_same_function(method: Any, pattern: str) -> None:
    sparse, model = trained(ConvNet, method, pattern)
    keys = set(ConvNet().state_dict())
    x = example(model, batch=3)
    expected = sparse.eval()(x)
    planned = {site.name for site in sparse.plan.sites}
    frozen = nm.freeze(sparse)
    assert frozen is model
    assert set(frozen.state_dict()) == keys
    torch.testing.assert_close(frozen(x), expected)
    assert planned <= {name for name, axes in nm.verify(frozen, pattern).satisfied.items() if 1 in axes}
    assert "stem.weight" not in nm.verify(frozen, pattern).satisfied
    frozen.train()
    frozen(x).sum().backward()
    nm.compile(frozen, x)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_freezing_holds_the_value_of_one_weight_beside_the_model_and_not_those_of_all(
    live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    x = torch.ones(2, 8)
    sparse: Any = nm.compile(model, method=nm.SRSTE(), then="eager") if live else nm.compile(model, x, method=nm.SRSTE())
    sparse(x)
    own, module = {id(p) for p in model.parameters()}, sys.modules["nm_compiler.passes.freeze_masks"]
    compute, values, most = module.value_of, list[weakref.ref[torch.Tensor]](), list[int]()

    def value_of(gm: GraphModule, node: Node) -> Any:
        value = compute(gm, node)
        if id(value) not in own:
            values.append(weakref.ref(value))
        most.append(sum(each() is not None for each in values))
        return value

    monkeypatch.setattr(module, "value_of", value_of)
    assert len(nm.verify(nm.freeze(sparse)).satisfied) == len(values) == 4
    assert max(most) == 1


def test_wrapped_models_freeze_from_the_outside() -> None:
    sparse, model = trained(MLP, nm.BiMask())
    assert nm.freeze(torch.compile(sparse, backend="eager")) is model


def test_before_t_f_freezing_explains_itself_and_finishing_is_offered() -> None:
    model = ConvNet()
    sparse = nm.compile(model, example(model), method=nm.LBC())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        nm.NMError, match=r"2 of 2 weights are not 2:4 yet \(first conv1.weight of shape \[8, 8, 3, 3\]\).*finish=True"
    ):
        nm.freeze(sparse)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    frozen = nm.freeze(sparse, finish=True)
    assert {"conv1.weight", "conv2.weight"} <= set(nm.verify(frozen).satisfied)


def test_a_frozen_model_cannot_be_used_or_frozen_again_through_its_carrier() -> None:
    sparse, model = trained(MLP, nm.SRSTE())
    nm.freeze(sparse)
    for use in (lambda: sparse(example(model)), lambda: nm.freeze(sparse), nm.SparsityScheduler(sparse, total_steps=1).step):
        with pytest.raises(nm.NMError, match="frozen"):
            use()


def test_weights_that_went_nan_in_training_are_not_frozen() -> None:
    sparse, model = trained(MLP, nm.SRSTE())
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    with pytest.raises(nm.NMError, match=r"fc2.weight of shape \[16, 16\] has 1 NaN"):
        nm.freeze(sparse)
    assert not sparse.frozen


def test_a_model_that_only_trains_with_a_weight_still_gets_zeros_in_it() -> None:
    class Auxiliary(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(16, 16)
            self.side_head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> Any:
            hidden = torch.relu(self.fc2(torch.relu(self.fc1(x))))
            out = self.fc3(hidden)
            return (out, self.side_head(torch.relu(self.side(hidden)))) if self.training else out

    model = Auxiliary()
    sparse = nm.compile(model, example(model), method=nm.SRSTE())
    assert {site.name for site in sparse.plan.sites} == {"fc2.weight", "side.weight"}
    assert isinstance(sparse(example(model)), tuple)
    assert isinstance(sparse.eval()(example(model)), torch.Tensor)
    assert set(nm.verify(nm.freeze(sparse)).satisfied) == {"fc2.weight", "side.weight"}


@pytest.mark.parametrize("kind", [Matmuls, Grouped])
def test_mixed_patterns_freeze_each_to_its_own(kind: type[nn.Module]) -> None:
    other = "conv1.*" if kind is Matmuls else "grouped*"
    sparse, _ = trained(kind, nm.BiMask(), {other: "1:4", "*": "2:4"})
    wanted = {site.name: (site.pattern, site.in_axis) for site in sparse.plan.sites}
    assert len({pattern for pattern, _ in wanted.values()}) == 2
    frozen = nm.freeze(sparse)
    for name, (pattern, axis) in wanted.items():
        assert axis in nm.verify(frozen, pattern).satisfied[name]
    found = nm.verify(frozen, {other: "1:4", "*": "2:4"})
    rows = {row.name: row for row in found.weights if row.name in wanted}
    assert all(rows[name].pattern == pattern and axis in rows[name].axes for name, (pattern, axis) in wanted.items())
    strict = {name for name, (pattern, _) in wanted.items() if pattern == nm.Pattern(1, 4)}
    assert nm.verify(frozen, "1:4").satisfied.keys() & wanted.keys() == strict
    some = nm.verify(frozen, {other: "1:4"})
    assert some.satisfied.keys() == strict
    assert "no pattern" in str(some)


def test_the_users_own_buffers_that_look_like_state_stay() -> None:
    model = MLP()
    model.fc2.register_buffer("weight_mask", torch.ones(16, 16))
    model.fc2.weight_order = nn.Parameter(torch.zeros(3))
    keys = set(model.state_dict())
    nm.freeze(nm.compile(model, example(model), method=nm.LBC()), finish=True)
    assert set(model.state_dict()) == keys


def test_a_mask_edited_to_keep_too_much_stops_freezing_before_anything_is_written() -> None:
    sparse, model = trained(MLP, nm.Magnitude())
    good, x = model.fc2.weight_mask.clone(), example(model)
    before, expected = model.fc2.weight.detach().clone(), sparse(x)
    model.fc2.weight_mask.fill_(255)
    with pytest.raises(nm.NMError, match=r"fc2.weight of shape \[16, 16\]: its mask keeps 4 of 4 in a group, not 2:4"):
        nm.freeze(sparse)
    assert torch.equal(model.fc2.weight, before)
    model.fc2.weight_mask.copy_(good)
    for mode in (True, False):
        torch.testing.assert_close(sparse.train(mode)(x), expected)
    assert "fc2.weight" in nm.verify(nm.freeze(sparse)).satisfied


def test_wrappers_are_seen_through_where_they_are_one_and_named_where_not() -> None:
    sparse, _ = trained(MLP, nm.BiMask())
    around = nn.Sequential(sparse, nn.Tanh())
    assert set(nm.verify(around).satisfied) == {"0.fc2.weight"}
    with pytest.raises(nm.NMError, match="Sequential is not a compiled model itself, but its submodule '0' is"):
        nm.freeze(around)
    averaged = torch.optim.swa_utils.AveragedModel(sparse)
    averaged.update_parameters(sparse)
    assert set(nm.verify(nm.freeze(averaged)).satisfied) == {"fc2.weight"}
    assert not sparse.frozen


def test_verify_reads_modules_state_dicts_and_files(tmp_path: Path) -> None:
    sparse, model = trained(ConvNet, nm.SRSTE())
    state = nm.freeze(sparse).state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "model": state}, tmp_path / "nested.pth")
    save_file(state, tmp_path / "plain.safetensors")
    expected = nm.verify(model).satisfied
    assert set(expected) == {"conv1.weight", "conv2.weight"}
    for target in (state, tmp_path / "plain.pt", tmp_path / "nested.pth", str(tmp_path / "plain.safetensors")):
        found = nm.verify(target)
        assert found.satisfied == expected
    assert "conv1.weight" in str(found)
    assert "2 of 4 weights are 2:4." in str(found)
    assert found.to_dict()["satisfied"] == 2


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_truncated_file_is_an_error_with_its_size_and_what_to_do(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = MLP().state_dict()
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(nm.NMError, match=rf"{name} \({path.stat().st_size} bytes\) cannot be read.*save it again"):
        nm.verify(path)


def test_a_whole_model_in_a_file_is_refused_with_two_ways_out_and_both_work(tmp_path: Path) -> None:
    model, path = MLP(), tmp_path / "model.pt"
    torch.save(model, path)
    with pytest.raises(nm.NMError, match=r"holds more than tensors.*model\.state_dict\(\).*weights_only=False"):
        nm.verify(path)
    found = nm.verify(torch.load(path, weights_only=False)).to_dict()
    torch.save(model.state_dict(), path)
    assert nm.verify(path).to_dict() == found


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    for target, message in (
        (tmp_path / "none.pt", "no such file"),
        (tmp_path / "readme.txt", "not .txt"),
        (tmp_path / "empty.pt", "holds no state_dict"),
        ({}, "holds no state_dict"),
    ):
        with pytest.raises(nm.NMError, match=message):
            nm.verify(target)


@pytest.mark.parametrize("ask", [nm.verify, lambda model, pattern: nm.verify(model.state_dict(), pattern), nm.report])
def test_verify_and_report_refuse_a_glob_that_matches_nothing(ask: Any) -> None:
    model = ConvNet()
    with pytest.raises(
        nm.NMError, match=r"pattern=\{'layer4.\*': '1:4'\} matches no weight; .* such as stem.weight, conv1.weight"
    ):
        ask(model, pattern={"layer4.*": "1:4", "*": "2:4"})
    assert ask(model, pattern={"conv*": "1:4", "*": "2:4"})


@pytest.mark.parametrize("method", [nm.BiMask(), nm.Magnitude()], ids=str)
def test_verify_looks_at_a_compiled_model_through_its_masks(method: Any) -> None:
    sparse, _ = trained(ConvNet, method)
    assert set(nm.verify(sparse).satisfied) == {"conv1.weight", "conv2.weight"}
    assert not nm.verify(sparse.origin).satisfied
    assert "whose masks are not in these values: verify that one" in str(nm.verify(sparse.origin))
    assert "masks" not in str(nm.verify(sparse)) + str(nm.verify(nn.Sequential(sparse)))
    assert "masks" not in str(nm.verify(nm.freeze(sparse, finish=True)))


def test_verify_says_of_a_part_of_a_live_model_that_its_masks_are_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 4))
    sparse = nm.compile(model, method=nm.Magnitude(), then="eager")
    sparse(torch.randn(2, 8))
    found = nm.verify(sparse[1])
    assert (found.satisfied, found.part_of) == ({}, ("0.weight",))
    assert nm.verify(sparse).satisfied == {"1.0.weight": (1,)}
    assert not nm.verify(sparse).part_of


def test_the_report_is_text_dict_and_html_with_the_same_lines() -> None:
    model = ConvNet()
    sparse = nm.compile(model, example(model), method=nm.LBC())
    report = nm.report(sparse)
    as_dict = report.to_dict()
    assert {"name", "op", "shape", "pattern", "status", "reason"} <= set(as_dict["weights"][0])
    assert as_dict["totals"]["sparse"] == 2
    assert as_dict["totals"]["weights"] == 4
    text, page = str(report), report.to_html()
    for row in as_dict["weights"]:
        assert row["name"] in text
        assert row["name"] in page
        assert row["reason"] in text
    conv1 = next(row for row in as_dict["weights"] if row["name"] == "conv1.weight")
    assert conv1["live"] == 6
    assert conv1["retained"] == 1.0
    assert "<script" not in page
    assert "http" not in page


def test_the_report_measures_what_the_masks_keep() -> None:
    model = MLP()
    sparse = nm.compile(model, example(model), method=nm.BiMask())
    row = next(row for row in nm.report(sparse).rows if row.status == "sparse")
    w = model.fc2.weight.detach().double()
    forward = w * (w.abs().view(16, 4, 4).argsort(-1, descending=True).argsort(-1) < 2).view(16, 16)
    backward = forward.abs().view(4, 4, 16).sort(1, descending=True).values[:, :2]
    assert row.retained == pytest.approx(float(forward.abs().sum() / w.abs().sum()))
    assert row.backward_kept == pytest.approx(float(backward.sum() / forward.abs().sum()))
    assert row.nonzero == 0.5


def test_a_plain_or_frozen_module_is_reported_by_what_its_zeros_show() -> None:
    sparse, _ = trained(ConvNet, nm.SRSTE(), "1:4")
    frozen = nm.freeze(sparse)
    for target in (frozen, sparse):
        status = {row.name: row.status for row in nm.report(target, pattern="1:4").rows}
        assert status == {"stem.weight": "dense", "conv1.weight": "sparse", "conv2.weight": "sparse", "head.weight": "dense"}
    assert {row.status for row in nm.report(MLP()).rows} == {"dense"}


def test_a_frozen_model_of_mixed_patterns_is_reported_with_each_weights_own() -> None:
    mixed = {"grouped*": "1:4", "*": "2:8"}
    sparse, _ = trained(Grouped, nm.SRSTE(), mixed)
    wanted = {site.name: str(site.pattern) for site in sparse.plan.sites}
    assert set(wanted.values()) == {"1:4", "2:8"}
    frozen = nm.freeze(sparse)
    for found in (nm.report(frozen, mixed), nm.report(sparse)):
        assert {row.name: row.pattern for row in found.rows if row.status == "sparse"}.items() >= wanted.items()
    some = {row.name: row for row in nm.report(frozen, {"grouped*": "1:4"}).rows}
    assert {row.name for row in some.values() if "no rule of pattern=grouped* 1:4 matches it" in row.reason} == {
        name for name in some if not name.startswith("grouped")
    }


def test_verify_and_report_see_the_zeros_of_layers_that_torch_has_quantised() -> None:
    model, other = MLP(), MLP()
    for weight in (model.fc2.weight, other.fc1.weight):
        with torch.no_grad():
            weight.view(-1, 4)[:, 1:3] = 0
    for dense, wanted in ((model, "fc2.weight"), (other, "fc1.weight")):
        quantised = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear})
        assert nm.verify(quantised).satisfied == {wanted: (1,)}
        assert [row.name for row in nm.report(quantised).rows if row.status == "sparse"] == [wanted]
        assert len(nm.verify(quantised.state_dict()).satisfied) == 1
    static = torch.ao.nn.quantized.Conv2d(4, 8, 1)
    weight = torch.randn(8, 4, 1, 1) * torch.tensor([1.0, 0, 1, 0]).view(1, 4, 1, 1)
    static.set_weight_bias(torch.quantize_per_channel(weight, torch.rand(8) + 0.1, torch.full((8,), 3), 0, torch.qint8), None)
    for found in (nm.verify(nn.Sequential(static)), nm.verify(nn.Sequential(static).state_dict())):
        assert found.satisfied == {"0.weight": (1,)}


class Eighths(torch.Tensor):
    """As torchao's tensors: numbers of its own, for which hardly any op is there but one that gives floats."""

    held: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor) -> "Eighths":
        made = torch.Tensor._make_wrapper_subclass(Eighths, weight.shape, dtype=weight.dtype)
        made.held = (weight * 8).to(torch.int8)
        return made

    def dequantize(self) -> torch.Tensor:
        return self.held / 8

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Eighths.of(args[0].held / 8)
        raise NotImplementedError(func)


def test_verify_and_report_see_the_zeros_of_weights_that_are_quantised_tensors_of_another_class() -> None:
    layer = nn.Linear(8, 4)
    weight = torch.ones(4, 8) * torch.tensor([1.0, 0, 1, 0]).repeat(2)
    layer.weight = nn.Parameter(Eighths.of(weight), requires_grad=False)
    model = nn.Sequential(layer)
    for target in (model, model.state_dict()):
        assert nm.verify(target).satisfied == {"0.weight": (1,)}
    assert [row.name for row in nm.report(model).rows if row.status == "sparse"] == ["0.weight"]


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_the_report_of_a_module_around_a_compiled_one_has_its_masks_and_reasons(live: bool) -> None:
    model = MLP()
    inner = (
        nm.compile(model, method=nm.SRSTE(), then="eager") if live else nm.compile(model, example(model), method=nm.SRSTE())
    )
    inner(example(model))
    around = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 4))
    found, own = nm.report(around), nm.report(inner)
    assert "'1' is a MLP with SRSTE" in found.title
    assert [row.name for row in found.rows] == ["0.weight", *(f"1.{row.name}" for row in own.rows), "2.weight"]
    rows = {row.name: row for row in found.rows}
    assert all(rows[f"1.{row.name}"].reason == row.reason for row in own.rows)
    assert rows["1.fc2.weight"].retained < 1
    assert rows["0.weight"].reason == "not 2:4 along any axis"


@pytest.mark.parametrize("method", [nm.LBC(), nm.Gradual()], ids=str)
def test_the_report_says_of_masks_that_are_still_open_how_full_they_are(method: Any) -> None:
    model = MLP()
    sparse = nm.compile(model, example(model), method=method)
    scheduler = nm.SparsityScheduler(sparse, total_steps=20)
    reasons, sums = [], []
    for _ in range(20):
        scheduler.step()
        found = nm.report(sparse)
        reasons.append(next(row.reason for row in found.rows if row.name == "fc2.weight"))
        sums.append(found.summary())
    opened = ["; not 2:4 yet: its mask keeps up to " in reason for reason in reasons]
    assert opened == sorted(opened, reverse=True), "once it is 2:4 it stays so"
    assert opened[0]
    assert not opened[-1]
    assert [text.endswith("; masks of 1 still keep more than their pattern.") for text in sums] == opened


def test_a_wrapper_that_only_holds_the_model_as_its_module_is_looked_into() -> None:
    class Wrapper(nn.Module):
        """As Lightning Fabric's: what runs lies under another name, perhaps inside DDP."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._forward_module = nn.Sequential(model)

        @property
        def module(self) -> nn.Module:
            return self._forward_module[0]

        def forward(self, x: torch.Tensor) -> Any:
            return self._forward_module(x)

    model = MLP()
    sparse = nm.compile(model, example(model), method=nm.SRSTE())
    wrapper = Wrapper(sparse)
    assert nm.SparsityScheduler(wrapper, total_steps=1).total_steps == 1
    wrapper.head = nn.Linear(2, 2)
    with pytest.raises(nm.NMError, match="Wrapper is not a compiled model itself"):
        nm.parameter_groups(wrapper)
    del wrapper.head
    assert nm.freeze(wrapper) is model


def test_weights_that_were_tied_after_compile_are_an_error_where_each_has_a_mask_of_its_own() -> None:
    for method, matters in ((nm.LBC(), True), (nm.SRSTE(), False)):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        sparse = nm.compile(model, (torch.randn(4, 8),), method=method)
        model[1].weight = model[2].weight
        if not matters:
            assert nm.verify(nm.freeze(sparse), "2:4").satisfied.keys() == {"1.weight"}
            continue
        with pytest.raises(
            nm.NMError, match=r"1\.weight and 2\.weight of shape \[8, 8\] were tied after nm\.compile: .* before"
        ):
            nm.SparsityScheduler(sparse, total_steps=4)
        with pytest.raises(nm.NMError, match="were tied after nm.compile"):
            nm.freeze(sparse, finish=True)
