"""A lowered model goes to another process: as itself, as an exported program, as an AOTInductor package."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import aoti_compile_and_package

import nm_compiler as nm
from nm_compiler.runtime.lowered import Lowered
from nm_compiler.runtime.native.library import load

ROOT = Path(__file__).parents[1]
ANY = (({0: torch.export.Dim.AUTO},),)  # forward takes *args: one tuple of all of them
THERE = """
import sys, torch
{first}
model = {load}
x, wanted = torch.load(sys.argv[2])
torch.testing.assert_close(model(x), wanted)
"""


def exported(model: Lowered, x: torch.Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=ANY), path)


def packaged(model: Lowered, x: torch.Tensor, path: Path) -> None:
    program = torch.export.export(model, (x,), dynamic_shapes=ANY)
    aoti_compile_and_package(program, package_path=str(path))


WAYS: dict[str, tuple[Callable[[Lowered, torch.Tensor, Path], None], str]] = {
    "itself": (lambda model, x, path: torch.save(model, path), "torch.load(sys.argv[1], weights_only=False)"),
    "exported": (exported, "torch.export.load(sys.argv[1]).module()"),
    "packaged": (packaged, "torch._inductor.aoti_load_package(sys.argv[1])"),
}


@pytest.mark.ci
@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("way", WAYS)
def test_a_lowered_model_runs_in_a_process_that_has_lowered_nothing(way: str, backend: str, tmp_path: Path) -> None:
    if backend == "cpu" and isinstance(load(), str):
        pytest.skip(f"no CPU kernels here: {load()}")
    x, other = torch.randn(16, 32), torch.randn(5, 32)
    model: nn.Module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    model = nm.freeze(nm.compile(model, (x,), method=nm.Magnitude())).eval()
    lowered = nm.lower(model, (x,), backend=backend, force=["*"] if backend == "cpu" else [])
    assert any(row.status == "sparse" for row in nm.report(lowered).rows) is (backend == "cpu"), "what is shipped is packed"
    save, loading = WAYS[way]
    with torch.no_grad():
        save(lowered, x, tmp_path / "model.pt2")
        torch.save((other, lowered(other)), tmp_path / "data.pt")
    first = "import nm_compiler" if backend == "cpu" else ""  # it registers nm::packed_linear
    done = subprocess.run(
        [sys.executable, "-c", THERE.format(first=first, load=loading), str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
