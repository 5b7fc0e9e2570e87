# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The TensorRT backend up to where TensorRT itself would begin: what is asked of it, and what it answers.

The first tests run the real Python package of torch_tensorrt over a stand-in for TensorRT, in a process of its own
(tensorrt_dryrun.py). `make test` installs that package, without its libraries, where `SCRATCH` looks for it.
"""

import json
import logging
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ConvNet
from tensorrt_recorder import Recorder
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import nm_compiler
from nm_compiler.errors import NMError
from nm_compiler.runtime.tensorrt import files, versions
from nm_compiler.runtime.tensorrt.build import Built, build
from nm_compiler.runtime.tensorrt.log import LOGGER, SparsityLog, listening, parse
from nm_compiler.runtime.tensorrt.options import NEEDED, merged

TESTS = Path(__file__).parent
SCRATCH = Path(os.environ.get("NM_TENSORRT_PYTHON", TESTS.parent / ".venv" / "tensorrt-python"))


# --- the real torch_tensorrt, up to the engine -----------------------------------------------------------------------


def dry_run(folder: Path, *models: str) -> dict[str, Any]:
    """What tensorrt_dryrun.py says of ``models``."""
    if not (SCRATCH / "torch_tensorrt").is_dir():
        pytest.skip("torch_tensorrt's Python package is not there: make test installs it, or set NM_TENSORRT_PYTHON")
    if not (find_spec("torchvision") and find_spec("transformers")):
        pytest.skip("the zoo is an extra: pip install -e '.[zoo]'")
    package = Path(nm_compiler.__file__).parents[1]
    path = os.pathsep.join(map(str, [package, TESTS, TESTS.parent / "benchmarks", SCRATCH]))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "tensorrt_dryrun.py"), str(folder / "out.json"), *models]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


def check_engine(name: str, found: dict[str, Any], ops: set[str]) -> None:
    """One engine holds every op, and every sparse weight reaches a product of ``ops`` as a 2:4 constant."""
    assert found["engines"] == ["_run_on_acc_0"], name
    assert not found["others"], name
    assert not found["left"], name
    assert set(found["weights"]) == set(found["planned"]), name
    assert {op for op, _ in found["weights"].values()} == ops, name
    assert all(fullest == 2 for _, fullest in found["weights"].values()), name  # never 1: random weights fill a group


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All models in one process: what it imports takes as long as some of them."""
    convnets, transformers = ("resnet50", "mobilenet_v2", "compile", "compile_freezing"), ("vit", "bert", "llama")
    return dry_run(tmp_path_factory.mktemp("dry"), *convnets, *transformers)


@pytest.mark.ci
@pytest.mark.required
def test_convnets_become_one_engine_whose_sparse_weights_are_2_of_4_constants(found: dict[str, Any]) -> None:
    check_engine("resnet50", found["resnet50"], {"aten.convolution.default"})
    check_engine("mobilenet_v2", found["mobilenet_v2"], {"aten.convolution.default"})
    assert [len(found[name]["planned"]) for name in ("resnet50", "mobilenet_v2")] == [19, 6]
    # torch.compile: Dynamo makes inputs of parameters, which TensorRT cannot run sparse, unless it prepares for freezing.
    assert found["compile"]["engines"] == ["_run_on_acc_0"]
    assert found["compile"]["weights"] == {}
    check_engine("compile", found["compile_freezing"], {"aten.convolution.default", "aten.addmm.default"})
    # What build() counts on in this version of torch_tensorrt.
    assert set(NEEDED) <= set(found["torch_tensorrt"]["keywords"])
    assert found["torch_tensorrt"]["logger"] == LOGGER


@pytest.mark.ci
@pytest.mark.required
def test_transformers_become_one_engine_whose_sparse_weights_are_2_of_4_constants(found: dict[str, Any]) -> None:
    for name in ("bert", "llama"):
        check_engine(name, found[name], {"aten.linear.default"})
    check_engine("vit", found["vit"], {"aten.linear.default", "aten.convolution.default"})  # its MLP runs as 1x1 convolutions
    assert [len(found[name]["planned"]) for name in ("vit", "bert", "llama")] == [4, 6, 7]
    assert found["bert"]["profiles"] == [[[1, 16], [3, 16], [8, 16]]] * 2  # batch=(1, 3, 8), traced with 2


# --- what torch_tensorrt is called with ------------------------------------------------------------------------------


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", made.module)
    return made


@pytest.fixture
def program() -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(2, 3, 8, 8).half()
    return torch.export.export(ConvNet().eval().half(), (x,)), x


def dynamic(dim: Any = None) -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(4, 3, 8, 8).half()
    return torch.export.export(ConvNet().eval().half(), (x,), dynamic_shapes=({0: dim or Dim("batch")},)), x


def test_torch_tensorrt_is_called_with_what_sparsity_needs_and_with_the_users_keywords(
    recorder: Recorder, program: tuple[ExportedProgram, Tensor]
) -> None:
    exported, x = program
    built = build(exported, (x,), options={"cache_built_engines": True, "engine_cache_dir": "engines", "min_block_size": 3})
    (call,) = recorder.calls
    assert call == {
        "exported_program": exported, "arg_inputs": (x,), "kwarg_inputs": {}, "sparse_weights": True, "use_fp32_acc": False,
        "immutable_weights": True, "min_block_size": 3, "attn_bias_is_causal": False, "strip_engine_weights": False,
        "cache_built_engines": True, "reuse_cached_engines": False, "engine_cache_dir": "engines",
    }  # fmt: skip
    assert "enabled_precisions" not in call
    torch.testing.assert_close(built.module(x), exported.module()(x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enabled_precisions": {torch.half}}, "strongly typed.*model.half"),
        ({"sparse_weights": False}, "does not look at the zeros"),
        ({"use_fp32_acc": True}, "float32, for which TensorRT has no sparse kernels"),
        ({"immutable_weights": False}, "refitted"),
        ({"refit": True}, "refitted"),
        ({"strip_engine_weights": True}, "stripped"),
        ({"use_explicit_typing": False}, "precision"),
        ({"arg_inputs": ()}, "taken from the inputs"),
        ({"min_block_sise": 1}, "did you mean min_block_size"),
    ],
)  # fmt: skip
def test_an_option_that_would_undo_sparsity_or_be_ignored_is_refused(
    recorder: Recorder, program: tuple[ExportedProgram, Tensor], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(NMError, match=says):
        build(program[0], (program[1],), options=options)
    assert not recorder.calls


def test_an_option_that_says_what_is_done_anyway_is_fine(recorder: Recorder) -> None:
    assert merged({"sparse_weights": True, "use_fp32_acc": False}, recorder.module.dynamo.compile) == NEEDED


def test_inputs_that_are_not_the_programs_are_refused(recorder: Recorder, program: tuple[ExportedProgram, Tensor]) -> None:
    exported, x = program
    for inputs, kwargs in [((), None), ((x, x), None), ((x,), {"mask": x}), ((x[0],), None)]:
        with pytest.raises(NMError, match="program"):
            build(exported, inputs, kwargs=kwargs)
    assert not recorder.calls


def test_a_program_in_float32_is_built_with_a_warning(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, 8, 8)
    build(torch.export.export(ConvNet().eval(), (x,)), (x,))
    assert "no sparse kernels" in caplog.text


# --- dynamic batches -------------------------------------------------------------------------------------------------


@pytest.mark.ci(here=["bounded"])
@pytest.mark.parametrize("dim", [Dim("batch"), Dim.AUTO, Dim("batch", min=1, max=32)], ids=["open", "auto", "bounded"])
def test_a_dynamic_batch_is_traced_with_the_usual_size_between_the_bounds(recorder: Recorder, dim: Any) -> None:
    exported, x = dynamic(dim)
    built = build(exported, (x,), batch=(1, 6, 16))
    (call,) = recorder.calls
    (given,) = call["arg_inputs"]
    shapes = [(size, 3, 8, 8) for size in (1, 6, 16)]
    assert [given.min_shape, given.opt_shape, given.max_shape, given.dtype] == [*shapes, torch.half]
    (bounds,) = call["exported_program"].range_constraints.values()
    assert (int(bounds.lower), int(bounds.upper)) == (1, 16)
    (traced,) = (node.meta["val"] for node in call["exported_program"].graph.nodes if node.name == "x")
    assert traced.shape[0].node.hint == 6
    for size in (1, 5):
        rows = x[:1].repeat(size, 1, 1, 1)
        torch.testing.assert_close(built.module(rows), exported.module(check_guards=False)(rows))


def test_a_program_with_bounds_of_its_own_needs_no_batch(recorder: Recorder) -> None:
    exported, x = dynamic(Dim("batch", min=2, max=8))
    build(exported, (x,))
    (given,) = recorder.calls[0]["arg_inputs"]
    assert recorder.calls[0]["exported_program"] is exported
    assert [shape[0] for shape in (given.min_shape, given.opt_shape, given.max_shape)] == [1, 4, 8]


@pytest.mark.ci(here=["order", "outside", "fixed"])
@pytest.mark.parametrize(
    ("make", "batch", "says"),
    [
        (dynamic, None, "axis 0 of input x has no upper bound.*batch="),
        (dynamic, (4, 2, 8), "in that order"),
        (dynamic, (0, 2, 8), "from 1 on"),
        (dynamic, (1, 2.0, 8), "whole numbers"),
        (dynamic, (1, 1, 8), "batch of 1 for a constant"),
        (lambda: dynamic(Dim("batch", min=2, max=8)), (2, 4, 16), "outside what the program was exported for, 1 to 8"),
        (lambda: (torch.export.export(ConvNet().eval(), (torch.randn(2, 3, 8, 8),)), torch.randn(2, 3, 8, 8)), (1, 2, 8), "Dim on axis 0"),
    ],
    ids=["no bound", "order", "zero", "float", "usual 1", "outside", "fixed"],
)  # fmt: skip
def test_a_batch_that_no_engine_can_have_is_refused(
    recorder: Recorder, make: Callable[[], tuple[ExportedProgram, Tensor]], batch: Any, says: str
) -> None:
    exported, x = make()
    with pytest.raises(NMError, match=says):
        build(exported, (x,), batch=batch)
    assert not recorder.calls


# --- what TensorRT says of the zeros ---------------------------------------------------------------------------------

# NVIDIA/TensorRT issues 4054 and 2169 (TensorRT 8 and 10.2), shortened; the second wording is that of TensorRT 10.14 and 11.
OLD = (
    "(Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620, Conv_626",
    "(Sparsity) TRT inference plan picked sparse implementation for layers: Conv_619 + Relu_620",
)
NONE_CHOSEN = (
    "(Sparsity) Layers eligible for sparse math: Conv_22, MatMul_51",
    "(Sparsity) TRT inference plan picked sparse implementation for layers:",
)
NEW = (
    "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: PWN(conv1, relu1) + add, conv2",
    "(Sparsity) Chose 1 layer(s) using sparse tactics: conv2",
)
COUNTS = ("(Sparsity) Found 39 layer(s) eligible to use sparse tactics", "(Sparsity) Chose 0 layer(s) using sparse tactics")


def test_both_wordings_are_read() -> None:
    old, new = parse(["Total Activation Memory: 7864832", *OLD]), parse(NEW)
    assert old == SparsityLog(("MatMul_401", "Conv_619 + Relu_620", "Conv_626"), ("Conv_619 + Relu_620",), 3, 1, OLD)
    assert new == SparsityLog(("PWN(conv1, relu1) + add", "conv2"), ("conv2",), 2, 1, NEW)
    assert str(new) == "TensorRT chose sparse kernels for 1 of 2 eligible layers: conv2"
    assert parse(NONE_CHOSEN) == SparsityLog(("Conv_22", "MatMul_51"), (), 2, 0, NONE_CHOSEN)


def test_counts_without_names_are_counts() -> None:
    assert parse(COUNTS) == SparsityLog((), (), 39, 0, COUNTS)


def test_silence_is_not_the_same_as_nothing_eligible() -> None:
    nothing = parse(["(Sparsity) Layers eligible for sparse math:", NONE_CHOSEN[1]])
    assert str(nothing) == "TensorRT chose sparse kernels for 0 of 0 eligible layers"
    assert str(parse([])) == "TensorRT said nothing about sparsity"


def test_engines_add_up_and_a_second_selection_for_the_same_layers_replaces_the_first() -> None:
    first = (
        "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv2, conv9",
        "(Sparsity) Chose 0 layer(s) using sparse tactics",
    )
    log = parse([*OLD, *first, *NEW])
    assert log.eligible == ("MatMul_401", "Conv_619 + Relu_620", "Conv_626", "PWN(conv1, relu1) + add", "conv2")
    assert (log.eligible_count, log.chosen_count) == (5, 2)
    assert log.chosen == ("Conv_619 + Relu_620", "conv2")


def test_what_tensorrt_says_while_it_builds_comes_back_with_the_module(
    recorder: Recorder, program: tuple[ExportedProgram, Tensor]
) -> None:
    recorder.says = ("verbose line", *NEW)
    assert build(program[0], (program[1],)).log.chosen == ("conv2",)


@pytest.mark.parametrize("fails", [False, True])
def test_listening_leaves_the_logger_as_it_was_and_shows_nobody_more(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(LOGGER)
    before = (logger.level, list(logger.handlers), list(logger.filters), logger.propagate)
    try:
        with listening(LOGGER, logging.DEBUG, "(Sparsity)") as heard:
            logger.debug(NEW[0])
            logger.warning("a warning")
            if fails:
                raise RuntimeError("no engine")
    except RuntimeError:
        assert fails
    assert [record.getMessage() for record in heard] == [NEW[0]]
    assert [record.getMessage() for record in caplog.records] == ["a warning"]
    assert (logger.level, list(logger.handlers), list(logger.filters), logger.propagate) == before


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_version", "ours", "theirs"),
    [("2.11.0", "2.11.0", "10.15"), ("2.12.1+cu130", "2.12.1", "10.16"), ("2.13.0+cpu", "2.13.0", "11.0"), ("2.14.0", "2.14.0", "11.1")],
)  # fmt: skip
def test_the_advice_names_the_versions_that_go_together_and_the_command(torch_version: str, ours: str, theirs: str) -> None:
    said = versions.advice(torch_version)
    assert f"torch_tensorrt {ours} and TensorRT {theirs}" in said
    assert f"pip install torch-tensorrt=={ours} --extra-index-url https://pypi.nvidia.com" in said


def test_a_torch_that_no_torch_tensorrt_is_known_for_is_told_which_ones_are() -> None:
    assert "2.11, 2.12, 2.13, 2.14" in versions.advice("2.99.0")


def test_a_missing_torch_tensorrt_is_an_error_with_the_command(
    monkeypatch: pytest.MonkeyPatch, program: tuple[ExportedProgram, Tensor]
) -> None:
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NMError, match="not installed.*pip install torch-tensorrt=="):
        build(program[0], (program[1],))


def test_a_torch_tensorrt_for_another_torch_is_an_error_that_names_both(recorder: Recorder) -> None:
    recorder.module.__version__ = "2.7.0"
    with pytest.raises(
        NMError, match=f"torch_tensorrt 2.7.0 is installed beside torch {torch.__version__}".replace("+", "[+]")
    ):
        versions.import_torch_tensorrt()


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        ("got error Could not find libnvinfer.so.11", "cannot load TensorRT's libraries.*pip install"),
        ("Torch not compiled with CUDA enabled", "needs an NVIDIA GPU"),
        ("something else", "cannot be imported [(]something else"),
    ],
)  # fmt: skip
def test_a_torch_tensorrt_that_does_not_import_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], raised: str, says: str
) -> None:
    package = tmp_path / "torch_tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text(f"print('noise')\nraise Exception({raised!r})\n")
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: torch.__version__)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NMError, match=says):
        versions.import_torch_tensorrt()
    assert capsys.readouterr().out == ""
    assert "torch_tensorrt" not in sys.modules


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_notes_the_versions_that_made_it_and_is_saved_with_the_inputs_it_was_built_for(
    recorder: Recorder, program: tuple[ExportedProgram, Tensor], tmp_path: Path
) -> None:
    built = build(program[0], (program[1],))
    path = files.save(built, tmp_path / "model.ep", retrace=False)
    call = recorder.calls[-1]
    assert (call["module"], call["arg_inputs"], call["retrace"]) == (built.module, (program[1],), False)
    with zipfile.ZipFile(path) as archive:
        (name,) = archive.namelist()
        assert json.loads(archive.read(name))["torch"] == torch.__version__


def test_a_folder_that_cannot_be_written_to_is_an_error_before_anything_is_saved(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(NMError, match="cannot be written to"):
            files.save(Built(nn.Identity(), SparsityLog()), folder / "model.ep")
    assert not recorder.calls


def test_an_engine_of_another_tensorrt_is_an_error_that_names_both(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorrt = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    tensorrt.__version__ = "10.15.1.29"
    path = files.save(Built(nn.Identity(), SparsityLog()), tmp_path / "model.ep")
    tensorrt.__version__ = "11.0.0.114"
    with pytest.raises(
        NMError, match="made with tensorrt 10.15.1.29 .* with tensorrt 11.0.0.114 .*not compatible.*lower the frozen model"
    ):
        files.load(path)
    assert capsys.readouterr().err == ""


def test_a_missing_and_a_damaged_file_are_errors_that_say_so(recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(NMError, match="no such file"):
        files.load(tmp_path / "model.ep")
    (tmp_path / "model.ep").write_bytes(b"not a zip")
    with pytest.raises(NMError, match="damaged"):
        files.load(tmp_path / "model.ep")
