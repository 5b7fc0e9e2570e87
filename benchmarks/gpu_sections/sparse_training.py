"""Bi-Mask on sparse tensor cores, part by part and as a whole step, beside dense and beside torch's training on 2:4 tiles.

y = x (W * F)^T, dx = g (W * B), dW = g^T x. The sparse sides mask, turn and pack the weight in every step. torch's way prunes
4x4 tiles so that one mask is 2:4 along both axes, and packs both in one kernel (`torch._sparse_semi_structured_tile`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import table
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from gpu_sections.lowered import GatedMLP
from gpu_sections.timing import Found, in_turn, replayed
from nm_compiler.runtime.cusparselt.training import cslt_input_grad, cslt_train_linear
from nm_compiler.solvers.two_masks import two_masks

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # [out, in]
TOKENS = (16384, 65536)

Work = Callable[[], object]


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Parts of a step by shape and tokens, then steps of an MLP as a user makes them."""
    found["parts"], found["steps"] = [], []
    if device.type == "cuda" and torch.backends.cusparselt.is_available():
        for out, inputs in ((256, 128),) if dry else SHAPES:
            for tokens in (64,) if dry else TOKENS:
                found["parts"].append(_parts(out, inputs, tokens, device))
        _print(found["parts"])
    else:
        print("no cuSPARSELt here: products stay dense")
    for tokens in (64,) if dry else TOKENS:
        found["steps"].append(_step(tokens, device, dry))


def _parts(out: int, inputs: int, tokens: int, device: torch.device) -> dict[str, Any]:
    weight = torch.randn(out, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
    x, g = (torch.randn(tokens, k, device=device, dtype=torch.bfloat16) for k in (inputs, out))
    order = torch.randperm(out, device=device)
    forward, turned = two_masks(weight, order, 2, 4)
    backward = torch.empty_like(weight).index_copy_(0, order, turned.t())
    work: dict[str, Work] = {
        "dense y": partial(functional.linear, x, weight),
        "dense dx": partial(torch.matmul, g, weight),
        "dW": partial(torch.matmul, g.t(), x),
        "two masks": partial(two_masks, weight, order, 2, 4),
        "pack one": partial(torch._cslt_compress, forward),
        "pack two": lambda: (torch._cslt_compress(forward), torch._cslt_compress(turned)),
    }
    for name, columns in (("columns", True), ("rows", False)):
        work[f"packed y, {name}"] = partial(cslt_train_linear, x, forward, turned, order, None, 1, columns)
        work[f"packed dx, {name}"] = partial(cslt_input_grad, g, turned, order, 1, columns)
    work["packed dx, columns, folded"] = partial(cslt_input_grad, g, turned, None, 1, True)
    errors = {
        "y": _error(cslt_train_linear(x, forward, turned, order, None, 1, True), x.double() @ forward.double().t()),
        "dx": _error(cslt_input_grad(g, turned, order, 1, True), g.double() @ backward.double()),
    }
    notes = _tiles(work, weight, x, g)
    ms, launched = dict[str, float](), in_turn(work, device, repeats=5)
    for name, each in work.items():
        try:
            ms |= in_turn({name: replayed(each)}, device, repeats=9, calls=3)
        except RuntimeError as error:  # what waits for the device cannot be captured
            notes[f"{name}, as a CUDA graph"] = str(error).splitlines()[0]
            torch.cuda.synchronize()
    return {
        "out": out, "in": inputs, "tokens": tokens, "ms": ms, "launched_ms": launched, "errors": errors, "notes": notes
    }  # fmt: skip


def _tiles(work: dict[str, Work], weight: Tensor, x: Tensor, g: Tensor) -> dict[str, str]:
    """Add torch's own way to ``work``; why not, where it does not run here."""

    def made() -> Any:
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(weight)

    try:
        tile = made()
        torch._cslt_sparse_mm(tile.packed, x.t())
        torch._cslt_sparse_mm(tile.packed_t, g.t())
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return {"torch's 2:4 tiles": str(error)[:120].splitlines()[0]}
    work["tiles: prune and pack two"] = made
    work["tiles: y, columns"] = partial(torch._cslt_sparse_mm, tile.packed, x.t())
    work["tiles: dx, columns"] = partial(torch._cslt_sparse_mm, tile.packed_t, g.t())
    return {}


def _print(found: list[dict[str, Any]]) -> None:
    """A whole step is what it takes to get y, dx and dW; packing is inside the packed products, and outside those of tiles."""
    rows = []
    for each in found:
        ms = each["ms"] or each["launched_ms"]
        dense = ms["dense y"] + ms["dense dx"] + ms["dW"]
        ours = {
            how: ms["two masks"] + ms[f"packed y, {how}"] + ms[f"packed dx, {how}"] + ms["dW"]
            for how in ("columns", "rows")
            if f"packed y, {how}" in ms and f"packed dx, {how}" in ms and "two masks" in ms
        }
        each["step_over_dense"] = {how: dense / value for how, value in ours.items()}
        names = ("tiles: prune and pack two", "tiles: y, columns", "tiles: dx, columns", "dW")
        if all(name in ms for name in names):
            each["step_over_dense"]["tiles"] = dense / sum(ms[name] for name in names)
        ratios = {how: f"{ratio:.2f}x" for how, ratio in each["step_over_dense"].items()}
        shown = ("dense y", "dense dx", "dW", "two masks", "pack two", "packed y, columns", "packed dx, columns")
        rows.append([
            f"{each['out']}x{each['in']}, {each['tokens']} tokens",
            *(f"{ms[name]:.3f}" if name in ms else "" for name in shown),
            *(ratios.get(how, "") for how in ("columns", "rows", "tiles")),
            f"{max(each['errors'].values()):.0e}",
        ])  # fmt: skip
        for name, note in each["notes"].items():
            print(f"{name}: {note}")
    head = ["Bi-Mask linear, bf16, ms", "dense y", "dense dx", "dW", "two masks", "pack two", "packed y", "packed dx",
            "step, columns", "rows", "tiles", "error"]  # fmt: skip
    print("as CUDA graphs; a packed product packs its weight first; step: dense over it")
    print(table(head, rows), flush=True)


def _step(tokens: int, device: torch.device, dry: bool) -> dict[str, Any]:
    """Forward, backward and optimizer of the MLP of Llama 3 8B, bf16, as launched from Python and under torch.compile."""
    torch.manual_seed(0)
    width, hidden = (64, 128) if dry else (4096, 14336)
    dense = GatedMLP(width, hidden).to(device, torch.bfloat16)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    methods: dict[str, nm.Method] = {
        "Bi-Mask": nm.BiMask(),
        "packed": nm.BiMask(products="cusparselt", min_tokens=1),
        "packed, folded": nm.BiMask(products="cusparselt", min_tokens=1, fold=True),
    }
    models: dict[str, nn.Module] = {"dense": dense}
    for name, method in methods.items():
        models[name] = nm.compile(copy.deepcopy(dense), (x[:16],), method=method, include=["*"]).train()
    steps = {name: _training(model, model, x) for name, model in models.items()}
    ms = in_turn(steps, device, repeats=2 if dry else 5)
    if device.type == "cuda" and not dry and tokens == TOKENS[0]:
        made = {f"{name}, compiled": _training(model, torch.compile(model), x) for name, model in models.items()}
        ms |= in_turn(made, device, repeats=5)
    rows = [[name, f"{value:.2f}", f"{_base(ms, name) / value:.3f}x"] for name, value in ms.items()]
    print(table([f"step of an MLP {width}-{hidden}, {tokens} tokens", "ms", "dense / it"], rows), flush=True)
    return {"tokens": tokens, "width": width, "hidden": hidden, "ms": ms}


def _training(model: nn.Module, run: Any, x: Tensor) -> Work:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        given = x.detach().requires_grad_()  # a layer in the middle of a network
        run(given).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _base(ms: dict[str, float], name: str) -> float:
    return ms["dense, compiled" if name.endswith("compiled") else "dense"]


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())
