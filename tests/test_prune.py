# mypy: disable-error-code="arg-type,assignment,attr-defined,index,no-any-return,no-untyped-call,operator,union-attr"
"""A checkpoint folder is pruned into another one: right, in little memory, whole or not at all, and after a kill it goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import layers, read_all, write_folder
from safetensors.torch import save_file
from torch import nn

import nm_compiler as nm
from nm_compiler import cli
from nm_compiler.errors import NMError
from nm_compiler.solvers.importance import ria, wanda
from nm_compiler.solvers.magnitude import magnitude_mask
from nm_compiler.streaming import parts as parts_module
from nm_compiler.streaming.folder import INDEX

PRUNED = [f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(3) for kind in ("down", "up")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "dense", layers(3))


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts even of a tiny weight."""
    monkeypatch.setattr(parts_module, "PART", 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_linears_keep_their_largest_weights_and_all_else_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, pattern: str
) -> None:
    small_parts(monkeypatch)
    dense = write_folder(tmp_path / "dense", layers(3, dtype=dtype))
    found = nm.prune_checkpoint(dense, tmp_path / "out", pattern=pattern)
    before, after, nm_pattern = read_all(dense), read_all(tmp_path / "out"), nm.Pattern.parse(pattern)
    assert sorted(found.pruned) == PRUNED
    assert before.keys() == after.keys()
    for name, value in before.items():
        kept = magnitude_mask(value, nm_pattern.n, nm_pattern.m, 1) if name in found.pruned else torch.ones_like(value)
        assert torch.equal(after[name], value * kept), name
    assert set(nm.verify(tmp_path / "out", pattern).satisfied) >= set(PRUNED)


def test_headers_index_config_and_tokenizer_are_the_same_files(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"dense")
    found = nm.prune_checkpoint(folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"pytorch_model.bin"} | {"nm_prune.json"}
    assert found.left == ("pytorch_model.bin",)
    assert "not taken over: pytorch_model.bin" in str(found)
    for name in (INDEX, "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    for shard in folder.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).stat().st_size == shard.stat().st_size


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_may_be_called_after_something_else_than_the_model(tmp_path: Path, shards: int) -> None:
    folder = write_folder(tmp_path / "dense", layers(3)[-shards:])
    for path in folder.glob("model*"):
        path.rename(folder / f"diffusion_pytorch_{path.name}")
    for index in folder.glob("*.index.json"):
        index.write_text(index.read_text().replace('"model-', '"diffusion_pytorch_model-'))
    found = nm.prune_checkpoint(folder, tmp_path / "out")
    assert len(found.pruned) == 2 * shards
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()} - {"nm_prune.json"}
    assert set(nm.verify(tmp_path / "out", "2:4").satisfied) >= set(found.pruned)


def test_a_pruned_folder_can_be_pruned_further(folder: Path, tmp_path: Path) -> None:
    nm.prune_checkpoint(folder, tmp_path / "once")
    assert nm.prune_checkpoint(tmp_path / "once", tmp_path / "twice", pattern="1:4").left == ("nm_prune.json",)
    assert set(nm.verify(tmp_path / "twice", "1:4").satisfied) >= set(PRUNED)


def test_a_single_file_without_an_index_is_pruned_too(tmp_path: Path) -> None:
    dense = write_folder(tmp_path / "dense", layers(1))
    assert nm.prune_checkpoint(dense, tmp_path / "out").shards == 1
    assert not (tmp_path / "out" / INDEX).exists()


def test_globs_choose_and_patterns_differ(folder: Path, tmp_path: Path) -> None:
    patterns = {"*.down_proj.*": "1:4", "*": "2:4"}
    found = nm.prune_checkpoint(folder, tmp_path / "out", pattern=patterns, include="lm_head.*", exclude=["*.0.mlp.up_proj.*"])
    assert set(found.pruned) == set(PRUNED) - {"model.layers.0.mlp.up_proj.weight"} | {"lm_head.weight"}
    assert "excluded by '*.0.mlp.up_proj.*'" in str(found)
    narrow = nm.verify(tmp_path / "out", "1:4").satisfied
    assert [name for name in PRUNED if name in narrow] == [name for name in PRUNED if "down" in name]


@pytest.mark.parametrize("rule", ["wanda", "ria"])
def test_importance_in_parts_is_the_importance_of_the_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    small_parts(monkeypatch)
    before = read_all(folder)
    norms = {name: torch.rand(before[name].shape[1]) * 5 for name in PRUNED}
    save_file(norms, tmp_path / "norms.safetensors")
    nm.prune_checkpoint(folder, tmp_path / "out", importance=rule, statistics=tmp_path / "norms.safetensors")
    after = read_all(tmp_path / "out")
    for name in PRUNED:
        squares = norms[name].double().square()
        whole = wanda(before[name], squares) if rule == "wanda" else ria(before[name], squares, out_axis=0, row_axes=[1])
        best = (whole * magnitude_mask(whole, 2, 4, 1)).sum()
        assert float((whole * (after[name] != 0)).sum()) == pytest.approx(float(best), rel=1e-6)
        assert not torch.equal(after[name] != 0, magnitude_mask(before[name], 2, 4, 1))


def test_what_calibrate_saves_prunes_as_one_shot_compile_does(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    dense = write_folder(tmp_path / "dense", [{name: value.clone() for name, value in model.state_dict().items()}])
    batches = [torch.randn(8, 16) for _ in range(3)]
    statistics = nm.calibrate(model, batches)
    statistics.save(tmp_path / "norms.safetensors")
    nm.prune_checkpoint(dense, tmp_path / "out", importance="wanda", statistics=tmp_path / "norms.safetensors")
    sparse = nm.compile(model, batches[0], method=nm.Magnitude(importance=nm.Wanda(statistics)), include="*")
    after, expected = read_all(tmp_path / "out"), nm.freeze(sparse).state_dict()
    assert all(torch.equal(after[name], value) for name, value in expected.items())


def prune_until_killed(dense: Path, out: Path) -> None:
    """Ends in the middle of the third shard, with the signal that nobody can catch."""

    def told(shard: str, tensor: str, size: int) -> None:
        if shard.startswith("model-00003") and tensor.endswith("up_proj.weight"):
            os.kill(os.getpid(), signal.SIGKILL)

    nm.prune_checkpoint(dense, out, progress=told)


def test_a_killed_run_leaves_whole_shards_only_and_goes_on_with_the_rest(tmp_path: Path) -> None:
    dense, out = write_folder(tmp_path / "dense", layers(4)), tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=prune_until_killed, args=(dense, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert not (out / INDEX).exists()  # nothing loads half a model
    assert [path.name for path in out.glob(".*.half")] == [".model-00003-of-00004.safetensors.half"]
    told: list[str] = []
    found = nm.prune_checkpoint(dense, out, progress=lambda shard, tensor, size: told.append(shard))
    assert found.went_on == 2
    assert {name[:11] for name in told} == {"model-00003", "model-00004"}
    nm.prune_checkpoint(dense, tmp_path / "at once")
    assert all(torch.equal(value, read_all(tmp_path / "at once")[name]) for name, value in read_all(out).items())
    assert not list(out.glob(".*.half"))


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=Path(__file__).parents[1])


MEMORY = """
import os, resource, sys
import nm_compiler as nm
os.fsync = lambda _: None  # a slow disk has nothing to do with memory
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
nm.prune_checkpoint(sys.argv[1], sys.argv[2])  # loads what there is to load, kernels too
before = peak()
nm.prune_checkpoint(sys.argv[3], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.ci
def test_memory_holds_two_layers_at_most_of_a_checkpoint_of_many(tmp_path: Path) -> None:
    small = write_folder(tmp_path / "small", layers(1, width=512, hidden=512))
    many = layers(8, width=1024, hidden=4096)
    layer = sum(value.nbytes for value in many[1].values())
    large = write_folder(tmp_path / "large", [{n: v for part in many for n, v in part.items()}])  # one shard: no relief
    ended = python(MEMORY, small, tmp_path / "out 1", large, tmp_path / "out 2")
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 2 * layer < sum(value.nbytes for part in many for value in part.values()) / 3


def tell(problem: str, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Break the folder, or what is asked of it; the arguments that show it."""
    shards = sorted(folder.glob("*.safetensors"))
    data = bytearray(shards[1].read_bytes())
    index = json.loads((folder / INDEX).read_text())
    out = tmp_path / "out"
    if problem == "no folder":
        return {"checkpoint": tmp_path / "nowhere"}
    if problem == "no weights":
        for path in [*shards, folder / INDEX]:
            path.unlink()
    if problem == "several models":
        (folder / INDEX).unlink()
    if problem == "missing shard":
        shards[1].unlink()
    if problem == "truncated":
        shards[1].write_bytes(data[:-100])
    if problem == "longer":
        shards[1].write_bytes(data + b"more")
    if problem == "empty file":
        shards[1].write_bytes(b"")
    if problem == "header length":
        shards[1].write_bytes((10**9).to_bytes(8, "little") + data[8:])
    if problem == "header text":
        shards[1].write_bytes(data[:8] + b"?" + data[9:])
    if problem == "twice in a header":
        header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        shards[1].write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    if problem == "wrong size":
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1]}}'
        shards[1].write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    if problem == "gap":
        header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
        shards[1].write_bytes(len(header).to_bytes(8, "little") + header + b"00")
    if problem == "twice in shards":
        save_file({**read_all(folder)}, shards[0], metadata={"format": "pt"})
    if problem == "twice in the index":
        name = next(iter(index["weight_map"]))
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{shards[0].name}", '))
    if problem == "single and index":
        shutil.copy(shards[0], folder / "model.safetensors")
    if problem == "not in the index":
        index["weight_map"].pop("lm_head.weight")
    if problem == "index elsewhere":
        index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    if problem in ("not in the index", "index elsewhere"):
        (folder / INDEX).write_text(json.dumps(index))
    if problem == "index no JSON":
        (folder / INDEX).write_text("{")
    if problem == "other files":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    if problem == "out is a file":
        out.write_text("")
    if problem == "damaged journal":
        out.mkdir()
        (out / "nm_prune.json").write_text("{}")
    if problem == "norms of another shape":
        save_file({name: torch.ones(3) for name in PRUNED}, tmp_path / "norms.safetensors")
    if problem == "norms lack a weight":
        save_file({PRUNED[0]: torch.ones(3)}, tmp_path / "norms.safetensors")
    if problem == "negative norms":
        save_file({name: -torch.ones(64 if "up" in name else 128) for name in PRUNED}, tmp_path / "norms.safetensors")
    norms = {"importance": "wanda", "statistics": tmp_path / "norms.safetensors"}
    arguments: dict[str, dict[str, Any]] = {
        "pattern": {"pattern": "4:2"}, "importance": {"importance": "wandas"}, "no statistics": {"importance": "wanda"},
        "needless statistics": {"statistics": tmp_path / "x"}, "norms of another shape": norms, "norms lack a weight": norms,
        "negative norms": norms, "no norms": norms, "equal": {"out": folder}, "out inside": {"out": folder / "out"},
        "checkpoint inside": {"out": tmp_path}, "another order": {"permute": "random"}, "glob": {"include": ["*.q_proj.*"]},
        "nothing planned": {"pattern": "32:64", "exclude": "*"}, "does not divide": {"pattern": "1:48"},
    }  # fmt: skip
    return arguments.get(problem, {})


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("no folder", "no such folder"),
        ("no weights", "holds neither model.safetensors nor model.safetensors.index.json"),
        ("several models", "neither model.safetensors nor an index that says what belongs together"),
        ("missing shard", "lacks 1 of 3 shards, model-00002-of-00003.safetensors first"),
        ("truncated", "truncated, 100 bytes are missing"),
        ("longer", "4 bytes follow the last tensor"),
        ("empty file", "0 bytes, which cannot hold the header"),
        ("header length", "cannot hold the header that its first 8 bytes announce"),
        ("header text", "its header is no JSON"),
        ("twice in a header", "'a' is listed twice in its header"),
        ("wrong size", "a, F32 of shape [1], cannot fill bytes 0 to 1"),
        ("gap", "a begins at byte"),
        ("twice in shards", "is listed twice, in model-00001-of-00003.safetensors and in model-00002-of-00003"),
        ("twice in the index", "model.safetensors.index.json lists 'model"),
        ("single and index", "every tensor may be listed twice"),
        ("not in the index", "puts lm_head.weight in no file, it lies in model-00003-of-00003.safetensors"),
        ("index elsewhere", "'../other.safetensors', which is no .safetensors file of the same folder"),
        ("index no JSON", "model.safetensors.index.json cannot be read"),
        ("other files", "is not empty (thesis.tex) and holds no run of prune"),
        ("out is a file", "is a file: give a folder"),
        ("damaged journal", "nm_prune.json cannot be read"),
        ("pattern", "did you mean '2:4'?"),
        ("importance", "importance='wandas': choose from magnitude, wanda, ria"),
        ("no statistics", "needs the norms of every weight's inputs, in a file. To make one: statistics = nm.calibrate"),
        ("needless statistics", "importance='magnitude' does not use statistics"),
        ("no norms", "cannot be read"),
        ("norms of another shape", "norms of model.layers.0.mlp."),
        ("norms lack a weight", "has no norms for 5 weights"),
        ("negative norms", "must be finite numbers that are not negative"),
        ("equal", "is the checkpoint itself"),
        ("out inside", "lies inside the checkpoint"),
        ("checkpoint inside", "give another folder to write to"),
        ("another order", "permute='random': say permute=True, which searches for an order"),
        ("glob", "include='*.q_proj.*' matches no tensor"),
        ("nothing planned", "no tensor of this checkpoint can be 32:64"),
        ("does not divide", "64 input features, groups of 1:48 need a multiple of 48"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(folder: Path, tmp_path: Path, problem: str, said: str) -> None:
    arguments = {"checkpoint": folder, "out": tmp_path / "out", **tell(problem, folder, tmp_path)}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(NMError) as error:
        nm.prune_checkpoint(**arguments)
    assert said in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_another_run_in_the_same_folder_is_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    nm.prune_checkpoint(folder, tmp_path / "out")
    first = r"model\.layers\.\S+ was 2:4 along axis 1, now 1:4 along axis 1, and \d+ more\. Give the same"
    with pytest.raises(NMError, match=rf"another run of prune: pattern was 2:4, now 1:4; {first}") as error:
        nm.prune_checkpoint(folder, tmp_path / "out", pattern="1:4")
    assert str(error.value).count("along axis") == 2, "one weight of many"
    with pytest.raises(
        NMError, match=r"another run of prune: model\.layers\.0\.\S+ was 2:4 along axis 1, now dense, and \d+ more\."
    ):
        nm.prune_checkpoint(folder, tmp_path / "out", exclude=["model.layers.0.*"])
    other = write_folder(tmp_path / "other", layers(3))
    with pytest.raises(NMError, match="the checkpoint has changed or is another one"):
        nm.prune_checkpoint(other, tmp_path / "out")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(NMError, match="needs 0.00 GB, 0.00 GB are free"):
        nm.prune_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_whole_shards_and_the_run_goes_on_when_there_is_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = parts_module.write_tensor, 0

    def full(target: Any, values: torch.Tensor) -> None:
        nonlocal written
        written += values.nbytes
        if written > 60_000:  # in the second shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(target, values)

    with monkeypatch.context() as patch:
        patch.setattr("nm_compiler.streaming.prune.write_tensor", full)
        with pytest.raises(
            NMError, match=r"model-00002-of-00003.safetensors could not be written \(No space left on device\)"
        ):
            nm.prune_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00003.safetensors"]
    assert not list((tmp_path / "out").glob(".*.half"))
    assert nm.prune_checkpoint(folder, tmp_path / "out").went_on == 1
    assert nm.verify(tmp_path / "out").satisfied


def test_a_file_that_the_system_refuses_to_write_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(NMError, match="model-00001-of-00003.safetensors could not be written"):
            nm.prune_checkpoint(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").glob("*model-*"))


def test_a_shard_that_does_not_read_back_never_takes_its_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nm_compiler.streaming.judging.masked", lambda values, out, **_: out.copy_(values)
    )  # as a broken disk would
    with pytest.raises(NMError, match="does not read back as 2:4"):
        nm.prune_checkpoint(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*model-*"))


def test_two_runs_do_not_write_to_one_folder(folder: Path, tmp_path: Path) -> None:
    again: list[str] = []

    def other(shard: str, tensor: str, size: int) -> None:
        with pytest.raises(NMError, match="another process is writing to it") as error:
            nm.prune_checkpoint(folder, tmp_path / "out")
        again.append(str(error.value))

    nm.prune_checkpoint(folder, tmp_path / "out", progress=other)
    assert again
    assert nm.verify(tmp_path / "out").satisfied


def test_the_command_prints_what_is_sparse_and_what_is_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["prune", str(folder), out, "--pattern", "2:4", "--exclude", "*.0.mlp.up_proj.*"]) == 0
    said = capsys.readouterr().out
    assert "5 weights are 2:4, verified; planned from names (config.json is missing or empty)" in said
    assert "dense: lm_head.weight: a head, by its name" in said
    assert cli.main(["verify", out, "--weights", "*.down_proj.weight"]) == 0
    assert cli.main(["prune", str(folder), out, "--pattern", "1:4"]) == 2
    assert "another run of prune" in capsys.readouterr().err


def saved(transformers: Any, name: str, path: Path) -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 48}
    if name == "Llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=48))
    model.save_pretrained(path, max_shard_size="20KB")
    return model.eval()


@pytest.mark.parametrize(("name", "axis"), [("Llama", 1), ("GPT2", 0)])
def test_the_model_on_meta_says_where_the_inputs_of_a_linear_lie(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, axis: int
) -> None:
    small_parts(monkeypatch)
    model = saved(transformers, name, tmp_path / "dense")
    found = nm.prune_checkpoint(tmp_path / "dense", tmp_path / "out", pattern="2:4")
    assert found.basis == f"the modules of {type(model).__name__}"
    assert set(found.pruned.values()) == {axis}
    assert len(found.pruned) == (14 if name == "Llama" else 8)
    pruned = type(model).from_pretrained(tmp_path / "out")
    for weight in found.pruned:
        before = model.get_parameter(weight)
        assert torch.equal(pruned.get_parameter(weight), before * magnitude_mask(before, 2, 4, axis)), weight


def test_a_config_of_another_shape_is_told(transformers: Any, tmp_path: Path) -> None:
    saved(transformers, "Llama", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(NMError, match=r"has shape \[64, 32\] in the checkpoint, \[128, 32\] in the LlamaForCausalLM"):
        nm.prune_checkpoint(tmp_path / "dense", tmp_path / "out")
