"""What lowering to cuSPARSELt gains: linears and 3x3 convolutions beside dense ones, an MLP of Llama 3 8B's shape, ViT-L/16;
memory of the weights.

Everything as a CUDA graph and as Python launches it; two networks under torch.compile as well. The zeros are by
magnitude: they cost no time, and accuracy is not asked for here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import table
from networks import ViTB16
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from gpu_sections.timing import Found, in_turn, replayed
from nm_compiler.capture.export import capture_mode
from nm_compiler.graph import tidy
from nm_compiler.passes.lower_cusparselt import lower_cusparselt
from nm_compiler.pattern import PatternMap
from nm_compiler.runtime.cusparselt.candidates import candidates
from nm_compiler.runtime.cusparselt.op import cslt_linear
from nm_compiler.runtime.cusparselt.packing import pack
from nm_compiler.runtime.cusparselt.search import search
from nm_compiler.runtime.cusparselt.unfold import unfold_taps
from nm_compiler.sites.plan import find
from nm_compiler.solvers.masks import masked

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336))  # [out, in]
TOKENS = (256, 2048, 16384)
CONVS = ((64, 56, 1), (128, 28, 1), (256, 14, 1), (512, 7, 1), (256, 28, 2))  # channels, pixels a side, stride: of ResNet-50
COMPILE_UNTIL_S = 120  # a network is compiled only if the section started less than this ago

Work = Callable[[], object]


class GatedMLP(nn.Module):
    """The MLP of Llama 3 8B: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int = 4096, hidden: int = 14336) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


@dataclass(frozen=True)
class Network:
    """A model with its input; include: globs of weights to take in although they are stem or head; compiled: that as well."""

    name: str
    model: nn.Module
    x: Tensor
    include: tuple[str, ...] = ()
    compiled: bool = False


def measure(device: torch.device, dry: bool, found: Found) -> None:
    """Linears at several numbers of tokens, then the networks."""
    begin = time.perf_counter()
    if device.type == "cuda" and torch.backends.cusparselt.is_available():
        found["products"] = _products(device, ((256, 128),) if dry else SHAPES, (64, 200) if dry else TOKENS)
        found["convolutions"] = _convolutions(device, ((32, 8, 1),) if dry else CONVS, 2 if dry else 128)
    else:
        print("no cuSPARSELt here: networks stay dense")
    found["networks"] = []
    for each in _networks(device, dry):
        found["networks"].append(_network(each, device, dry, begin))


def _products(device: torch.device, shapes: tuple[tuple[int, int], ...], counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows, found = [], []
    for out, inputs in shapes:
        weight = masked(torch.randn(out, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5, pattern="2:4")
        packed, bias = pack(weight), torch.randn(out, device=device, dtype=torch.bfloat16)
        for tokens in counts:
            x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
            columns: Callable[[], Tensor] = partial(cslt_linear, x, packed, bias, out, inputs, 0, False)
            work: dict[str, Work] = {
                "dense": partial(functional.linear, x, weight, bias),
                "columns": columns,
                "columns, copied": lambda columns=columns: columns().contiguous(),  # type: ignore[misc]
            }
            algorithm = search(weight, packed, x, bias, rows=True)
            if algorithm:
                work["rows, searched"] = partial(cslt_linear, x, packed, bias, out, inputs, algorithm, True)
            error = _error(columns(), functional.linear(x.double(), weight.double(), bias.double()))
            launched = in_turn({name: work[name] for name in ("dense", "columns")}, device, repeats=7)
            ms = in_turn({name: replayed(each) for name, each in work.items()}, device, repeats=9, calls=3)
            gains = (
                f"{ms['dense'] / ms[name]:.2f}x" if name in ms else ""
                for name in ("columns", "columns, copied", "rows, searched")
            )
            rows.append([f"{out}x{inputs}, {tokens} tokens", f"{ms['dense']:.3f}", *gains, f"{launched['dense']:.3f}",
                         f"{launched['dense'] / launched['columns']:.2f}x", f"{error:.0e}"])  # fmt: skip
            found.append({
                "out": out, "in": inputs, "tokens": tokens, "ms": ms, "launched_ms": launched, "algorithm": algorithm,
                "error": error, "dense_bytes": _bytes(weight), "packed_bytes": _bytes(packed),
            })  # fmt: skip
    head = ["y = x W^T + b, bf16, [out x in]", "dense ms", "columns", "copied", "searched", "launched ms", "columns", "error"]
    print("the first four as CUDA graphs, the last two as launched from Python")
    print(table(head, rows), flush=True)
    return found


def _convolutions(device: torch.device, shapes: tuple[tuple[int, int, int], ...], batch: int) -> list[dict[str, Any]]:
    """3x3 convolutions in channels_last beside the packed product of their unfolded input, the copy included and by itself."""
    rows, found = [], []
    for channels, side, stride in shapes:
        form = torch.channels_last
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=torch.bfloat16) / (3 * channels**0.5)
        weight = masked(weight, pattern="2:4", axis=1).contiguous(memory_format=form)
        x = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16).contiguous(memory_format=form)
        packed = pack(weight)
        copy = partial(unfold_taps, x, [3, 3], [stride, stride], [1, 1, 1, 1], [1, 1])

        def unfolded(copy: Callable[[], Tensor] = copy, packed: Tensor = packed, channels: int = channels) -> Tensor:
            pixels = copy()
            y: Tensor = cslt_linear(pixels.flatten(0, -2), packed, None, channels, 9 * channels, 0, False)
            return y.contiguous().view(*pixels.shape[:-1], channels).movedim(-1, 1)

        dense = partial(functional.conv2d, x, weight, None, stride, 1)
        error = _error(unfolded(), functional.conv2d(x.float(), weight.float(), None, stride, 1))
        work: dict[str, Work] = {"dense": dense, "unfolded": unfolded, "copy": copy}
        ms = in_turn({name: replayed(each) for name, each in work.items()}, device, repeats=9, calls=3)
        rows.append([f"{channels} channels, {side}x{side}, stride {stride}", *(f"{value:.3f}" for value in ms.values()),
                     f"{ms['dense'] / ms['unfolded']:.2f}x", f"{error:.0e}"])  # fmt: skip
        found.append({"channels": channels, "side": side, "stride": stride, "batch": batch, "ms": ms, "error": error})
    head = [f"3x3 convolutions, bf16, {batch} images", "dense ms", "unfolded", "of it copy", "dense / it", "error"]
    print(table(head, rows), flush=True)
    return found


def _networks(device: torch.device, dry: bool) -> list[Network]:
    torch.manual_seed(0)
    width, hidden, counts = (64, 128, (16,)) if dry else (4096, 14336, (1024, 4096, 16384))
    block = GatedMLP(width, hidden).to(device, torch.bfloat16).eval()
    vit = (ViTB16(width=64, depth=1) if dry else ViTB16(width=1024, depth=24)).to(device, torch.bfloat16).eval()
    images = torch.randn(2 if dry else 64, 3, 224, 224, device=device, dtype=torch.bfloat16)
    inputs = [torch.randn(count, width, device=device, dtype=torch.bfloat16) for count in counts]
    blocks = [Network(f"MLP {width}-{hidden}, {len(x)} tokens", block, x, ("*",), compiled=len(x) == 4096) for x in inputs]
    return [*blocks, Network(f"ViT, {len(images)} images", vit, images, compiled=True)]


@torch.no_grad()
def _network(work: Network, device: torch.device, dry: bool, begin: float) -> dict[str, Any]:
    variants: dict[str, GraphModule] = {}
    dense, memory, reasons = _lowered(work, None, dry)
    variants["dense"] = dense
    if not reasons:
        for name, searched in (("packed", False), ("packed, searched", True)):
            variants[name], memory, _ = _lowered(work, searched, dry)
    wanted, ms = dense(work.x)[0], dict[str, float]()
    errors = {name: _error(each(work.x)[0], wanted) for name, each in variants.items()}
    calls: dict[str, Work] = {name: partial(each, work.x) for name, each in variants.items()}
    ms |= {f"{name}, launched": value for name, value in in_turn(calls, device, repeats=2 if dry else 7).items()}
    if device.type == "cuda":
        ms |= in_turn({name: replayed(each) for name, each in calls.items()}, device, repeats=2 if dry else 9)
        if work.compiled and not dry and time.perf_counter() - begin < COMPILE_UNTIL_S:
            made: dict[str, Work] = {
                f"{name}, compiled": partial(torch.compile(each), work.x) for name, each in variants.items()
            }
            ms |= in_turn({name: replayed(each) for name, each in made.items()}, device, repeats=9)
    rows = [[name, f"{value:.3f}", f"{_base(ms, name) / value:.2f}x"] for name, value in ms.items()]
    print(table([work.name, "ms", "dense / it"], rows))
    print(f"weights that are 2:4: {memory['dense'] / 2**20:.1f} MiB dense, {memory['packed'] / 2**20:.1f} MiB packed")
    print("\n".join(f"stays dense: {', '.join(names)}: {reason}" for reason, names in reasons.items()), flush=True)
    return {"network": work.name, "ms": ms, "errors": errors, "bytes": memory, "reasons": reasons}


def _lowered(work: Network, searched: bool | None, dry: bool) -> tuple[GraphModule, dict[str, int], dict[str, list[str]]]:
    """The captured graph, lowered unless ``searched`` is None; bytes of its planned weights; why some of them stay dense."""
    gm, _ = capture_mode(work.model, (work.x,), {}, training=False)
    sites = {site.name: site for site in find(work.model, [gm], PatternMap.parse("2:4"), include=work.include).sites}
    for name, site in sites.items():
        parameter = work.model.get_parameter(name)
        parameter.copy_(masked(parameter, pattern="2:4", axis=site.in_axis))
    least = 0 if dry else 1024
    found = candidates(gm, sites, min_tokens=least)
    dense = sum(_bytes(work.model.get_parameter(name)) for name in sites)
    if searched is not None:
        lower_cusparselt(gm, sites_by_read=sites, search=searched, min_tokens=least)
        tidy(gm)
    packed = sum(_bytes(value) for name, value in gm.__dict__["extras"].items() if name.endswith("_packed"))
    reasons: dict[str, list[str]] = {}
    for each in found:
        for reason in each.reasons:
            reasons.setdefault(reason, []).append(each.site.name)
    return gm, {"dense": dense, "packed": packed}, reasons


def _base(ms: dict[str, float], name: str) -> float:
    kind = name.partition(", ")[2].removeprefix("searched").removeprefix(", ")
    return ms[f"dense, {kind}" if kind else "dense"]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
