"""What 2:4 tensor cores offer through cuSPARSELt, before any of it is a backend of ours: products, packing.

y = x W^T with W 2:4 along `in`: the sparse operand is the left one of the library's product, so W x^T, written transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import table
from torch import Tensor
from torch.nn import functional

from gpu_sections.timing import Found, in_turn, replayed
from nm_compiler.solvers.masks import masked

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))  # [out, in]
TOKENS = (256, 1024, 2048, 4096, 16384)


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Products at several numbers of tokens."""
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        print("no cuSPARSELt here")
        found["skipped"] = "no cuSPARSELt"
    else:
        found["products"] = _products(device)


def product(packed: Tensor, x: Tensor, *, transposed: bool = True, algorithm: int = 0) -> Tensor:
    """``x W^T`` from the packed W; transposed: the library writes the result row by row."""
    y = torch._cslt_sparse_mm(packed, x.t(), transpose_result=transposed, alg_id=algorithm)
    return y if transposed else y.t()


def _products(device: torch.device) -> list[dict[str, Any]]:
    rows, found = [], []
    for out, inputs in SHAPES:
        weight = masked(torch.randn(out, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5, pattern="2:4")
        packed = torch._cslt_compress(weight)
        pack_ms = in_turn({"pack": partial(torch._cslt_compress, weight)}, device, repeats=9)["pack"]
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
            work: dict[str, Callable[[], object]] = {
                "dense": partial(functional.linear, x, weight),
                "sparse": partial(product, packed, x),
                "sparse, not transposed": partial(product, packed, x, transposed=False),
            }
            reference = functional.linear(x.double(), weight.double())
            error = float((product(packed, x).double() - reference).norm() / reference.norm())
            _check(product(packed, x, transposed=False), reference)
            best = _searched(packed, x)
            if best:
                agrees = torch.allclose(product(packed, x, algorithm=best), product(packed, x), rtol=2e-2, atol=2e-2)
                if agrees:
                    work["sparse, searched"] = partial(product, packed, x, algorithm=best)
            launched = in_turn({"sparse": work["sparse"]}, device, repeats=5, warmup=1)["sparse"]
            ms = in_turn({name: replayed(each) for name, each in work.items()}, device, repeats=15, warmup=3, calls=5)
            flops = 2.0 * tokens * out * inputs
            rows.append([f"{out}x{inputs}, {tokens} tokens", f"{ms['dense']:.3f}", f"{flops / ms['dense'] / 1e9:.0f}",
                         *(f"{ms['dense'] / ms[name]:.2f}x" if name in ms else "" for name in list(work)[1:3]),
                         f"{ms['dense'] / ms['sparse, searched']:.2f}x" if "sparse, searched" in ms else "",
                         f"{launched:.3f}", f"{pack_ms:.3f}", f"{error:.0e}"])  # fmt: skip
            found.append({
                "out": out, "in": inputs, "tokens": tokens, "ms": ms, "launched_ms": launched, "pack_ms": pack_ms,
                "error": error, "bytes": packed.numel() * packed.element_size() / (2.0 * weight.numel()),
            })  # fmt: skip
    head = ["y = x W^T, bf16, [out x in]", "dense ms", "TFLOP/s", "sparse", "not transp.", "searched", "launched ms",
            "pack ms", "error"]  # fmt: skip
    print("products as CUDA graphs; launched: the same sparse product called from Python")
    print(table(head, rows), flush=True)
    return found


def _check(y: Tensor, reference: Tensor) -> None:
    """A layout that is timed is right as well: relative error below 1 % in bf16."""
    error = float((y.double() - reference).norm() / reference.norm())
    assert error < 1e-2, f"relative error {error:.1e}"


def _searched(packed: Tensor, x: Tensor) -> int:
    """The algorithm that the library finds fastest; 0, its first choice, where it cannot be asked."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    return 0 if search is None else int(search(packed, x.t(), None, None, None, True)[0])
