# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""The Triton kernels on a CPU, in Triton's interpreter, against plain torch: equal to the bit, one launch an op.

Those of training are compiled as well. What only a GPU can show, that they run there and are fast, is in test_gpu.py and
benchmarks/gpu.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nm_compiler.solvers.masks import masked
from nm_compiler.solvers.two_masks import two_masks

TESTS = Path(__file__).parent
SCRATCH = Path(os.environ.get("NM_TRITON_PYTHON", TESTS.parent / ".venv" / "triton-python"))


def printed(script: str, **environment: str) -> dict[str, Any]:
    """The JSON of a script that needs triton, in a process of its own."""
    if not (SCRATCH / "triton").is_dir() and find_spec("triton") is None:
        pytest.skip(f"no triton in {SCRATCH}: `make test` puts it there")
    path = os.pathsep.join([str(TESTS.parent), str(SCRATCH)])
    whole = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable, str(TESTS / script)]
    done = subprocess.run(words, env=whole, capture_output=True, text=True, timeout=300, check=False)
    assert not done.returncode, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.ci
@pytest.mark.required
def test_kernels_agree_with_the_reference_to_the_bit_ties_zeros_nans_and_tails_included() -> None:
    same = printed("interpreted_triton.py", TRITON_INTERPRET="1")
    assert len(same) > 300
    assert [name for name, agrees in same.items() if not agrees] == []


@pytest.mark.ci
@pytest.mark.required
def test_backward_orders_are_those_that_torch_operations_find() -> None:
    same = printed("triton_orders.py", TRITON_INTERPRET="1")
    assert len(same) > 20
    assert [name for name, agrees in same.items() if not agrees] == []


@pytest.mark.ci
@pytest.mark.required
def test_kernels_of_training_compile_for_an_nvidia_gpu_and_round_a_product_before_they_add_to_it() -> None:
    found = printed("compiled_triton.py")
    assert len(found) == 25
    assert all(".visible .entry" in text for text in found.values())
    assert [name for name, text in found.items() if "fma." in text] == []
    in_registers = {
        name: text for name, text in found.items() if name.startswith(("neighbours", "apart", "two masks", "packed"))
    }
    assert len(in_registers) == 9
    for name, text in in_registers.items():
        assert ".local" not in text, name
        loads = set(re.findall(r"ld\.global\S*?\.(?:v\d\.)?b\d+", text))
        assert not any(load.endswith((".b8", ".b16")) for load in loads), name
        assert "two masks" in name or any(".v2.b64" in load or ".v4.b32" in load for load in loads), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_masks_are_one_mask_and_then_the_other_turned(dtype: torch.dtype) -> None:
    weight, order = torch.randn(32, 48).to(dtype), torch.randperm(32)
    forward, turned = two_masks(weight, order, 2, 4)
    assert torch.equal(forward, masked(weight, pattern="2:4"))
    assert torch.equal(turned, masked(forward[order], pattern="2:4", axis=0).t())
    assert turned.is_contiguous()
    assert torch.equal(two_masks(weight[order], None, 2, 4)[1], turned)
