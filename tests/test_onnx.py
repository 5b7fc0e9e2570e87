# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""ONNX files of five architectures: zeros along the reduction axis, the numbers of eager, whole or not there at all."""

from __future__ import annotations

import ast
import copy
import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import read_operators_once
from models import ConvNet, Stepping
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler import cli
from nm_compiler.capture.export import capture_mode
from nm_compiler.graph import run as run_passes
from nm_compiler.passes.fold_batchnorm import fold_batchnorm
from nm_compiler.runtime.onnx_files import commands, packages
from nm_compiler.runtime.onnx_files.export import Written, write
from nm_compiler.runtime.onnx_files.outline import outline
from nm_compiler.runtime.onnx_files.parts import parts, run_in_parts
from nm_compiler.runtime.onnx_files.reading import operands
from nm_compiler.runtime.onnx_files.streaming import write_streamed
from nm_compiler.runtime.onnx_files.wide import Wide

onnx = pytest.importorskip("onnx", reason="ONNX is an extra: pip install -e '.[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is an extra: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="ONNX is an extra: pip install -e '.[onnx]'")
pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'").declare_missing_operators()
nets = pytest.importorskip("nets", reason="the zoo is an extra: pip install -e '.[zoo]'", exc_type=ImportError)
pytestmark = pytest.mark.required
read_operators_once()

BATCH = torch.export.Dim.DYNAMIC


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))


@functools.cache
def convnet() -> tuple[nn.Module, Tensor, torch.export.ExportedProgram, dict[str, Any]]:
    """A small network, exported once for all tests: they only read it."""
    x = torch.randn(2, 3, 8, 8)
    model, sites = nets.pruned(ConvNet(16), x)
    return model, x, exported(model, x), sites


def small(path: Path, **options: Any) -> Written:
    _, x, program, sites = convnet()
    return write(program, (x,), path, sites=sites, **options)


def run(path: Path, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # ALL dies on the float16 ViT
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.ci
@pytest.mark.parametrize(
    "make", [nets.resnet18, nets.mobilenet_v2, nets.vit, nets.bert, nets.llama], ids=lambda make: make.__name__
)
def test_an_architecture_is_written_with_zeros_along_the_reduction_axis_and_the_numbers_of_eager(
    make: Callable[[], tuple[nn.Module, Tensor]], tmp_path: Path
) -> None:
    model, x, sites = nets.frozen_net(make)
    assert sites
    path = tmp_path / "model.onnx"
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 5e-3)):
        cast = copy.deepcopy(model).to(dtype)
        given = x.to(dtype) if x.is_floating_point() else x
        written = write(exported(cast, given), (given,), path, sites=sites)
        assert {weight.name for weight in written.weights} == set(sites)
        assert written.refusals == ()
        assert written.numerics.error <= allowed
        assert written.numerics.batches == (2, 3)
        more = torch.cat([given, given[:1].flip(1)])
        for batch in (more, more[:1]):
            with torch.no_grad():
                assert relative(run(path, batch), cast(batch)) <= allowed
        for weight in written.weights:
            assert weight.axis == (0 if weight.op == "MatMul" else 1), weight
            before, after = sites[weight.name].shape, weight.shape
            assert after == (before[::-1] if weight.op == "MatMul" else before)
        read = {operand.name: operand for operand in operands(path)}
        for name in sites:
            kept = torch.from_numpy(read[name].value != 0).movedim(read[name].axis, -1).unflatten(-1, (-1, 4)).sum(-1)
            assert int(kept.max()) == 2
        found = nm.verify(path)
        assert {weight.name for weight in found.weights if weight.axes} == set(sites)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param


class Pairs(nn.Module):
    """Takes the difference of each two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(x).unflatten(0, (-1, 2)).unbind(1)
        return first - second


def test_a_batch_that_must_be_even_is_compared_at_twice_its_size(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    program = torch.export.export(Pairs().eval(), (x,), dynamic_shapes=({0: 2 * torch.export.Dim("pairs")},))
    assert write(program, (x,), tmp_path / "model.onnx", sites={}).numerics.batches == (4, 8)


class Odd(nn.Module):
    """Every way in which a weight meets its product: joined, on the left, in a matmul, grouped, over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Parameter(torch.randn(96, 32) / 6)
        self.left = nn.Parameter(torch.randn(16, 32) / 6)
        self.right = nn.Parameter(torch.randn(32, 32) / 6)
        self.experts = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.grouped = nn.Conv1d(16, 16, 3, groups=2)
        self.twice = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x @ self.right)))
        q, k, v = (nn.functional.linear(x, part) for part in self.joined.chunk(3))
        x = self.grouped(self.left @ (q + k * v).transpose(1, 2))
        return torch.einsum("bct,ecd->betd", x, self.experts)


def test_weights_that_are_cut_shared_or_on_the_left_are_constants_of_their_products_and_others_have_a_reason(
    tmp_path: Path,
) -> None:
    x = torch.randn(2, 5, 32)
    model, sites = nets.pruned(Odd(), x, include=["*"])
    written = write(exported(model, x), (x,), tmp_path / "odd.onnx", sites=sites)
    assert {(w.name, w.op, w.axis) for w in written.weights} == {
        ("right", "MatMul", 0),
        ("twice.weight", "MatMul", 0),
        ("joined/0", "MatMul", 0),
        ("joined/1", "MatMul", 0),
        ("joined/2", "MatMul", 0),
        ("left", "MatMul", 1),
        ("grouped.weight", "Conv", 1),
    }
    assert [str(refusal) for refusal in written.refusals] == [
        "experts: the file reads it with Einsum, for which no runtime has N:M kernels"
    ]
    assert [tensor.name for tensor in onnx.load(written.path).graph.initializer].count("twice.weight") == 1


def test_weights_that_passes_have_folded_go_by_the_names_of_the_model(tmp_path: Path) -> None:
    model, x, _, sites = convnet()
    gm, _ = capture_mode(model, (x,), {}, training=False)
    gm = run_passes(gm, [fold_batchnorm])
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: BATCH},))
    named = {"conv1_weight_folded": sites["conv1.weight"], "conv2.weight": sites["conv2.weight"]}
    written = write(program, (x,), tmp_path / "model.onnx", sites=named)
    assert [weight.name for weight in written.weights] == ["conv1.weight", "conv2.weight"]
    assert set(nm.verify(written.path).satisfied) == {"conv1.weight", "conv2.weight"}
    with torch.no_grad():
        assert relative(run(written.path, x), model(x)) <= 1e-5
    with pytest.raises(nm.NMError, match="conv9.weight: the program has no such weight"):
        write(program, (x,), tmp_path / "model.onnx", sites={"conv9.weight": sites["conv1.weight"]})


def test_clones_that_the_file_holds_once_are_both_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4))
    model[4].load_state_dict(model[2].state_dict())
    x = torch.randn(2, 5, 16)
    model, sites = nets.pruned(model, x)
    written = write(exported(model, x), (x,), tmp_path / "model.onnx", sites=sites)
    assert [weight.name for weight in written.weights] == ["2.weight", "4.weight"]
    assert written.refusals == ()
    assert [weight.name for weight in nm.verify(written.path).weights if weight.axes] == ["2.weight"]


def test_flattened_tokens_become_a_gemm_with_zeros_along_axis_1(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(torch.relu(self.second(torch.relu(self.first(x.reshape(-1, 16)))))).view(-1, 5, 4)

    x = torch.randn(2, 5, 16)
    model, sites = nets.pruned(Flat(), x)
    written = write(exported(model, x), (x,), tmp_path / "flat.onnx", sites=sites)
    assert [(w.name, w.op, w.axis, w.shape) for w in written.weights] == [("second.weight", "Gemm", 1, (16, 32))]


def test_bfloat16_is_written_and_what_onnxruntime_cannot_run_is_said(tmp_path: Path) -> None:
    model, x, _, sites = convnet()
    x = x.bfloat16()
    written = write(exported(copy.deepcopy(model).bfloat16(), x), (x,), tmp_path / "model.onnx", sites=sites)
    assert written.opset >= 22
    assert len(written.weights) == len(sites) == 2
    assert written.numerics.error is None
    assert "not compared: onnxruntime" in str(written)
    assert set(nm.verify(written.path).satisfied) == set(sites)


def test_the_sidecar_holds_what_was_found_and_the_report(tmp_path: Path) -> None:
    written = small(tmp_path / "model.onnx", report={"title": "mine"})
    sidecar = json.loads((tmp_path / "model.onnx.json").read_text())
    assert sidecar["report"] == {"title": "mine"}
    assert sidecar["onnx"] == json.loads(json.dumps(written.to_dict()))
    assert sidecar["onnx"]["weights"][0] == {
        "name": "conv1.weight", "op": "Conv", "shape": [16, 16, 3, 3], "axis": 1, "pattern": "2:4",
    }  # fmt: skip
    assert sidecar["onnx"]["numerics"]["error"] <= 1e-5


def test_weights_above_the_limit_of_one_file_lie_beside_it_and_old_ones_go(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    first, second = small(path, one_file=0), small(path, one_file=0)
    model, x, *_ = convnet()
    assert first.data != second.data
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, second.data.name, "model.onnx.json"])
    assert relative(run(path, x), model(x).detach()) <= 1e-5
    assert set(nm.verify(path).satisfied) == {"conv1.weight", "conv2.weight"}
    moved = tmp_path / "elsewhere" / "model.onnx"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    with pytest.raises(nm.NMError, match=rf"cannot be read from '{second.data.name}'.*copy both files"):
        nm.verify(moved)
    second.data.write_bytes(second.data.read_bytes()[:1000])
    with pytest.raises(nm.NMError, match="cannot be read from"):
        nm.verify(path)


def test_a_model_that_is_not_frozen_is_refused_with_the_fullest_group(tmp_path: Path) -> None:
    model, x, _, sites = convnet()
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.conv1.weight[0, :4, 1, 1] = 1.0
    message = r"conv1.weight of shape \[16, 16, 3, 3\] is not 2:4 along axis 1: a group has 4 .*nm.freeze"
    with pytest.raises(nm.NMError, match=message):
        write(exported(model, x), (x,), tmp_path / "model.onnx", sites=sites)
    assert list(tmp_path.iterdir()) == []


def tampering(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], None]) -> None:
    """An exporter that damages conv1.weight."""
    import onnx_ir

    real = torch.onnx.ONNXProgram.optimize

    def optimize(self: Any) -> None:
        real(self)
        value = self.model.graph.initializers["conv1.weight"]
        array = value.const_value.numpy().copy()
        change(array)
        value.const_value = onnx_ir.Tensor(array, name=value.name)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", optimize)


def fill_a_group(array: np.ndarray) -> None:
    array[0, :4, 1, 1] = 1e-30  # no output shows it


def double(array: np.ndarray) -> None:
    array *= 2  # as sparse as before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fill_a_group, "conv1.weight became conv1.weight of shape .*not 2:4 along axis 1, where Conv reduces"),
        (double, "output 0 of shape .* differs by .* relative from the program's"),
    ],
)
def test_an_exporter_that_changes_weights_is_noticed_and_the_old_file_stays(
    change: Callable[[np.ndarray], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    small(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    tampering(monkeypatch, change)
    with pytest.raises(nm.NMError, match=said):
        small(path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.ci(here=["one file"])
@pytest.mark.parametrize("one_file", [0, 2**30], ids=["two files", "one file"])
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a Unix thing")
def test_a_disk_that_fills_in_the_middle_leaves_the_old_file(tmp_path: Path, one_file: int) -> None:
    """The limit on the size of a file fails the write after its first bytes, as a full disk does."""
    import resource

    path = tmp_path / "model.onnx"
    small(path, one_file=one_file)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
    try:
        with pytest.raises(nm.NMError, match=r"model.onnx cannot be written: .*as it was.*make room"):
            small(path, one_file=one_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_place_that_cannot_hold_the_file_is_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, x, program, sites = convnet()
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("it was exported"))
    (tmp_path / "folder.onnx").mkdir()
    places = {
        tmp_path / "model.pb": "called something.onnx",
        tmp_path / "no" / "model.onnx": "does not exist: make it first",
        tmp_path / "folder.onnx": "is a folder",
    }
    if sys.platform == "linux":
        places[Path("/proc/model.onnx")] = "cannot be written: .*another folder"
    for path, said in places.items():
        with pytest.raises(nm.NMError, match=said):
            write(program, (x,), path, sites=sites)


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(nm.NMError, match=r"an ONNX file also needs onnxruntime: pip install 'nm_compiler\[onnx\]'"):
        small(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(nm.NMError, match=r"reading .*model.onnx also needs onnx: pip install"):
        nm.verify(tmp_path / "model.onnx")
    assert packages.require("json", why="a test") == [json]


def test_an_op_that_onnx_does_not_have_is_named(tmp_path: Path) -> None:
    @torch.library.custom_op("nm_test_onnx::strange", mutates_args=())
    def strange(x: Tensor) -> Tensor:
        return x.clone()

    strange.register_fake(torch.empty_like)

    class Strange(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return strange(super().forward(x))

    model, x, _, sites = convnet()
    odd = Strange(16).eval()
    odd.load_state_dict(model.state_dict())
    with pytest.raises(nm.NMError, match=r"no translation for nm_test_onnx.strange.*other ops"):
        write(exported(odd, x), (x,), tmp_path / "model.onnx", sites=sites)
    assert list(tmp_path.iterdir()) == []


def initialiser(name: str, value: np.ndarray) -> Any:
    return onnx.numpy_helper.from_array(value.astype(np.float32), name)


def file_of(path: Path, nodes: list[Any], initialisers: list[Any], functions: Any = ()) -> Path:
    """A model of another tool: nodes from x to y."""
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("mine", 1)]
    graph = onnx.helper.make_graph(nodes, "g", [anything("x")], [anything("y")], initialisers)
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, functions=functions), path)
    return path


def anything(name: str) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


ALONG_1 = np.tile([1.0, 2.0, 0.0, 0.0], (8, 2))  # [8, 8], 2:4 along axis 1 and not along axis 0
node = onnx.helper.make_node


@pytest.mark.parametrize(
    ("nodes", "value", "axis"),
    [
        ([node("MatMul", ["x", "w"], ["y"])], ALONG_1.T, 0),
        ([node("MatMul", ["x", "w"], ["y"])], ALONG_1, None),
        ([node("MatMul", ["w", "x"], ["y"])], ALONG_1, 1),
        ([node("MatMul", ["x", "w"], ["y"])], np.stack([ALONG_1.T] * 3), 1),
        ([node("Gemm", ["x", "w"], ["y"])], ALONG_1.T, 0),
        ([node("Gemm", ["x", "w"], ["y"], transB=1)], ALONG_1, 1),
        ([node("Gemm", ["x", "w"], ["y"], transB=1)], ALONG_1.T, None),
        ([node("Gemm", ["w", "x"], ["y"], transA=1)], ALONG_1.T, 0),
        ([node("Conv", ["x", "w"], ["y"])], ALONG_1[:, :, None, None], 1),
        ([node("Conv", ["x", "w"], ["y"])], ALONG_1.T[:, :, None, None], None),
        ([node("Transpose", ["w"], ["v"], perm=[1, 0]), node("MatMul", ["x", "v"], ["y"])], ALONG_1, 0),
        ([node("Split", ["w"], ["a", "b"], axis=0, num_outputs=2), node("MatMul", ["a", "x"], ["y"])], ALONG_1, 1),
        ([node("MatMul", ["x", "w"], ["z"]), node("MatMul", ["w", "z"], ["y"])], ALONG_1.T, None),
        ([node("Add", ["x", "w"], ["y"])], ALONG_1, "absent"),
        ([node("Relu", ["w"], ["v"]), node("MatMul", ["x", "v"], ["y"])], ALONG_1.T, "absent"),
    ],
)
def test_verify_checks_the_axis_along_which_the_product_of_a_file_reduces(
    nodes: list[Any], value: np.ndarray, axis: Any, tmp_path: Path
) -> None:
    found = nm.verify(file_of(tmp_path / "model.onnx", nodes, [initialiser("w", value)]))
    assert [weight.name for weight in found.weights] == ([] if axis == "absent" else ["w"])
    assert found.satisfied == ({"w": (axis,)} if isinstance(axis, int) else {})


def test_verify_reads_constants_in_bodies_and_in_local_functions(tmp_path: Path) -> None:
    sparse = onnx.helper.make_graph([node("MatMul", ["x", "w"], ["inside"])], "then", [], [anything("inside")])
    other = onnx.helper.make_graph([node("Identity", ["x"], ["outside"])], "else", [], [anything("outside")])
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    nodes = [
        node("Constant", [], ["w"], value=initialiser("anything", ALONG_1.T)),
        node("If", ["c"], ["y"], then_branch=sparse, else_branch=other),
    ]
    assert nm.verify(file_of(tmp_path / "model.onnx", nodes, [condition])).satisfied == {"w": (0,)}
    opsets = [onnx.helper.make_opsetid("", 20)]
    function = onnx.helper.make_function("mine", "F", ["a", "b"], ["o"], [node("MatMul", ["a", "b"], ["o"])], opsets)
    called = [node("F", ["x", "w"], ["y"], domain="mine")]
    path = file_of(tmp_path / "model.onnx", called, [initialiser("w", ALONG_1.T)], [function])
    assert nm.verify(path).satisfied == {"w": (0,)}


@pytest.mark.parametrize("content", [b"", b"hello, this is text", "truncated"], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_model_is_an_error_with_its_size(content: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path / "model.onnx", [node("MatMul", ["x", "w"], ["y"])], [initialiser("w", ALONG_1)])
    path.write_bytes(path.read_bytes()[:-40] if content == "truncated" else content)
    with pytest.raises(nm.NMError, match=rf"model.onnx \({path.stat().st_size} bytes\) is no ONNX model.*export it again"):
        nm.verify(path)
    with pytest.raises(nm.NMError, match="no such file"):
        nm.verify(tmp_path / "none.onnx")


def test_the_command_fails_if_no_weight_or_a_named_one_is_not_sparse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [node("MatMul", ["x", "good"], ["z"]), node("MatMul", ["z", "bad"], ["y"])]
    path = str(file_of(tmp_path / "model.onnx", nodes, [initialiser("good", ALONG_1.T), initialiser("bad", np.ones((8, 8)))]))
    assert cli.main(["verify", path, "--pattern", "2:4"]) == 0
    assert cli.main(["verify", path, "--pattern", "1:4"]) == 1
    assert cli.main(["verify", path, "--weights", "good"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", path, "--weights", "good", "b*"]) == 1
    assert capsys.readouterr().err == "nm-compiler: not 2:4: bad\n"
    assert cli.main(["verify", path, "--weights", "goood"]) == 2
    assert "--weights goood matches no weight" in capsys.readouterr().err


def test_the_commands_name_the_file_ask_for_sparse_kernels_and_say_the_shapes(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    written = small(folder / "model.onnx")
    words = shlex.split(commands.trtexec(written))
    assert words[0] == "trtexec"
    assert {f"--onnx={written.path}", "--sparsity=enable", "--minShapes=x:1x3x8x8", "--maxShapes=x:2x3x8x8"} <= set(words)
    assert not {"--stronglyTyped", "--fp16"} & set(words)
    assert "--optShapes=x:32x3x8x8" in commands.trtexec(written, batch=32)
    assert "--stronglyTyped" in commands.trtexec(written, tensorrt=10)
    lines = commands.onnxruntime(written, batch=32)
    options = ast.literal_eval(ast.parse(lines).body[1].value)
    assert options["trt_sparsity_enable"] is True
    assert options["trt_profile_max_shapes"] == "x:32x3x8x8"
    assert "trt_fp16_enable" not in options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_streamed_file_is_the_model_and_its_outline_finds_the_weights_inside(tmp_path: Path, dtype: torch.dtype) -> None:
    import onnx_ir as ir
    from onnx import external_data_helper

    shapes = {"none": (0, 3), "one": (1,), "small": (4, 5), "large": (300, 7), "larger": (130, 130)}
    model = exported_model({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()})
    path, structure, plain = tmp_path / "m.onnx", tmp_path / "o.onnx", tmp_path / "plain.onnx"
    write_streamed(model, path)
    structure.write_bytes(outline(path).SerializeToString())
    ir.save(model, plain)
    wanted = {tensor.name: tensor.SerializeToString() for tensor in onnx.load(plain).graph.initializer}
    streamed = onnx.load(path)
    assert {tensor.name: tensor.SerializeToString() for tensor in streamed.graph.initializer} == wanted
    assert sorted(streamed.graph.node, key=str) == sorted(onnx.load(plain).graph.node, key=str)
    told = onnx.load(structure, load_external_data=False)
    outside = [tensor for tensor in told.graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in outside} == {"large", "larger"}
    assert structure.stat().st_size < 2000
    external_data_helper.load_external_data_for_model(told, str(tmp_path))
    assert {tensor.name: tensor.raw_data for tensor in told.graph.initializer} == {
        tensor.name: tensor.raw_data for tensor in streamed.graph.initializer
    }
    for each in (path, structure):
        onnx.checker.check_model(str(each), full_check=True)
    assert all(value.const_value.numpy().shape == shapes[name] for name, value in model.graph.initializers.items())


@pytest.mark.parametrize(
    ("at_once", "most_nodes"), [(1, 99), (5_000, 99), (2**30, 99), (2**30, 4)],
    ids=["one weight a part", "some", "whole", "four nodes a part"],
)  # fmt: skip
def test_a_file_in_parts_computes_what_it_computes_whole_and_no_part_holds_all_weights(
    tmp_path: Path, at_once: int, most_nodes: int
) -> None:
    written = small(tmp_path / "model.onnx")
    structure, x = tmp_path / "o.onnx", torch.randn(2, 3, 8, 8)
    structure.write_bytes(outline(written.path).SerializeToString())
    cut = list(parts(structure, at_once, most_nodes))
    whole = outline(written.path).graph
    assert [node.name for part in cut for node in part.model.graph.node] == [node.name for node in whole.node]
    weights = {tensor.name for tensor in whole.initializer}
    readers = sum(not weights.isdisjoint(node.input) for node in whole.node)
    assert len(cut) == {1: readers, 2**30: -(-len(whole.node) // most_nodes)}.get(at_once, len(cut))
    assert all(len(part.model.graph.node) <= most_nodes for part in cut)
    held = [{tensor.name for tensor in part.model.graph.initializer} for part in cut]
    assert set().union(*held) == {tensor.name for tensor in whole.initializer}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(written.path), options, providers=["CPUExecutionProvider"])
    feeds = [{"x": x.numpy()}, {"x": torch.cat([x, x]).numpy()}]
    found = run_in_parts(structure, feeds, onnxruntime.SessionOptions(), at_once=at_once, most_nodes=most_nodes)
    for feed, outputs in zip(feeds, found, strict=True):
        wanted = session.run(None, feed)
        assert list(outputs) == [value.name for value in session.get_outputs()]
        for mine, other in zip(outputs.values(), wanted, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_values_that_bodies_read_or_that_are_returned_as_they_are_cross_the_cuts(tmp_path: Path) -> None:
    one, two = (onnx.helper.make_graph([node(op, ["x", "b"], [op])], op, [], [anything(op)]) for op in ("Add", "Sub"))
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["a", "v"], ["b"]),
        node("If", ["c"], ["d"], then_branch=one, else_branch=two),
        node("MatMul", ["d", "u"], ["y"]),
    ]
    values = [initialiser(name, np.random.default_rng(i).normal(size=(8, 8))) for i, name in enumerate("wvu")]
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    opsets = [onnx.helper.make_opsetid("", 20)]
    typed = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 8]) for name in ("x", "y", "a")]
    graph = onnx.helper.make_graph(nodes, "g", typed[:1], typed[1:], [*values, condition])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    x = np.random.default_rng(7).normal(size=(4, 8)).astype(np.float32)
    wanted = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    (found,) = run_in_parts(path, [{"x": x}], onnxruntime.SessionOptions(), at_once=1)
    assert len(list(parts(path, 1))) > 1
    for mine, other in zip(found.values(), wanted, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


class Upscaled(nn.Module):
    """The end of a U-Net: half the size and back, to the sizes of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(nn.functional.max_pool2d(a, 2))
        return a + nn.functional.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.ci
def test_a_network_that_resizes_to_sizes_of_its_own_is_written_and_resizes_images_of_any_size(tmp_path: Path) -> None:
    x, path = torch.randn(2, 8, 8, 12), tmp_path / "model.onnx"
    model = nm.freeze(nm.compile(Upscaled(), (x,), method=nm.Magnitude(), include=["*"])).eval()
    free = ({0: BATCH, 2: BATCH, 3: BATCH},)
    nm.lower(model, (x,), backend="onnx", dynamic_shapes=free, options={"path": str(path)})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in ((1, 8, 8, 12), (3, 8, 13, 21)):
        y = torch.randn(size)
        (found,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        np.testing.assert_allclose(found, model(y).detach().numpy(), rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """Python that asks for the batch, as caches of anchors do: a graph is one branch of it."""

    def __init__(self, takes: Callable[[int], bool]) -> None:
        super().__init__()
        self.a, self.b, self.takes = nn.Linear(8, 16), nn.Linear(16, 16), takes

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        return x if self.takes(x.shape[0]) else 2 * x


@pytest.mark.ci
@pytest.mark.parametrize(
    ("takes", "said", "axis"),
    [
        (lambda n: n == 2, "x.shape[0] == 2", 2),
        (lambda n: n < 5, "x.shape[0] <= 4", None),
        (lambda n: n % 2 == 0, "% 2", None),
    ],
)
def test_a_batch_that_a_branch_fixes_is_fixed_in_the_file_and_conditions_that_no_file_checks_are_said(
    takes: Callable[[int], bool], said: str, axis: int | None, tmp_path: Path
) -> None:
    x, path = torch.randn(2, 8), str(tmp_path / "model.onnx")
    model = nm.freeze(nm.compile(Branching(takes), (x,), method=nm.Magnitude(), include=["*"])).eval()
    lowered = nm.lower(model, (x,), backend="onnx", options={"path": path})
    size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]
    assert (size.dim_value if axis else bool(size.dim_param)) == (axis or True)
    (line,) = (line for line in nm.report(lowered).notes if "Nothing in the file checks" in line)
    assert said in line
    np.testing.assert_allclose(run(Path(path), x), model(x).detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_step_that_writes_to_its_inputs_is_compared_at_two_batches_and_leaves_the_example_as_it_was(tmp_path: Path) -> None:
    x, cache, length = torch.randn(3, 8), torch.zeros(3, 4, 16), torch.tensor(1)
    model = nm.freeze(nm.compile(Stepping(), (x, cache, length), method=nm.Magnitude())).eval()
    nm.lower(model, (x, cache, length), backend="onnx", options={"path": str(tmp_path / "step.onnx")})
    assert (int(length), int(cache.count_nonzero())) == (1, 0)


def test_wide_products_are_those_of_float32_rounded_once() -> None:
    model, x, _, _ = convnet()
    half = copy.deepcopy(model).half()
    gm = exported(half, x.half()).module(check_guards=False)
    with torch.no_grad():
        found, plain = Wide(gm).run(x.half()), half(x.half())
    assert found.dtype == torch.float16
    assert relative(found, plain) <= 5e-3
    convolution = torch.fx.symbolic_trace(nn.Conv2d(3, 4, 3).half())
    graph = torch.export.export(convolution, (x.half(),)).module(check_guards=False)
    weight, bias = convolution.weight.float(), convolution.bias.float()
    assert torch.equal(Wide(graph).run(x.half()), nn.functional.conv2d(x.half().float(), weight, bias).half())


def exported_model(tensors: dict[str, torch.Tensor]) -> Any:
    """An `onnx_ir.Model` that returns its input and holds tensors as torch's exporter holds them."""
    import onnx_ir as ir
    from torch.onnx._internal.exporter._core import TorchTensor

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Identity", [x])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    held = []
    for name, tensor in tensors.items():
        made = TorchTensor(tensor, name=name)
        held.append(ir.Value(name=name, type=ir.TensorType(made.dtype), shape=made.shape, const_value=made))
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=held, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)
