"""What masks and scores cost by themselves in a training step, without the product: ours against the papers' layers.

    python benchmarks/mask_work.py [--quick] [--threads 1]

One weight of 1024 x 1024. LBC: mask, masked weight, gradients of weight and scores, SGD with momentum on the scores, and
removal (the released code ranks all scores before every step; ours retires only when the schedule says so, its cost is
spread over the steps of a 1,000-step training). Bi-Mask: both masks, both masked weights, the decay of the gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import CLOCKS, Spread, arguments, environment, interleaved, seconds, table, write
from published import PublishedBiMask, PublishedLBC
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.evaluate import value_of
from nm_compiler.methods.lbc import LBC
from nm_compiler.rewrite import masked_nodes

SIZE = 1024
SHORT = 1_000  # steps of the training over which retirements are spread
PATTERNS = ("2:4", "1:4", "2:8", "4:8", "1:16")


def ours(
    method: nm.Method, pattern: str, grad: Tensor, *, fused: bool | None = None
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(work of one step, one retirement) of a compiled weight, as its graph does it."""
    sparse = nm.compile(nn.Linear(SIZE, SIZE), torch.randn(2, SIZE), pattern=pattern, method=method, include="*")
    weight = sparse.weights[0]
    masked, weight_op = masked_nodes(sparse.graph(True), "weight")[0], weight.param
    scores = [weight["scores"]] if isinstance(method, LBC) else []
    trained = [s for s in scores if isinstance(s, nn.Parameter)] or [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(trained, 0.1, 0.9, fused=fused)
    inputs = [value_of(sparse.graph(True), a) if isinstance(a, torch.fx.Node) else a for a in masked.args]

    def step() -> None:
        forward = masked.target(*inputs)  # type: ignore[operator]
        if isinstance(method, nm.BiMask):
            torch.ops.nm.backward_weight(forward.detach(), weight["order"], *masked.args[1:3], weight.site.rows)
        forward.backward(grad)
        weight_op.grad = None
        optimizer.step()
        optimizer.zero_grad()

    def retire() -> None:
        if isinstance(method, LBC):
            live = weight["live"].clone()
            method._retire(weight, weight.site.pattern.combinations - 1)
            weight["live"].copy_(live)

    return step, retire


def published_lbc(pattern: nm.Pattern, grad: Tensor, *, fused: bool | None = None) -> Callable[[], None]:
    """One step of the released LBC layer's mask and score work; k = 1 removed, ranked in every step as they do."""
    layer = PublishedLBC(nn.Linear(SIZE, SIZE, bias=False), pattern.n, pattern.m)
    optimizer = torch.optim.SGD([layer.scores], 0.1, 0.9, fused=fused)

    def step() -> None:
        layer.remove(1)
        layer.masked_weight().backward(grad)
        layer.layer.weight.grad = None
        optimizer.step()
        optimizer.zero_grad()

    return step


def published_bimask(pattern: nm.Pattern) -> Callable[[], None]:
    """One step of the released Bi-Mask layer's mask work."""
    layer = PublishedBiMask(nn.Linear(SIZE, SIZE, bias=False), pattern.n, pattern.m, candidates=1)
    weight = layer.layer.weight.detach().t()

    def step() -> None:
        forward = layer._forward_mask()
        backward = layer._backward_mask(forward, layer.order)
        _ = weight * forward
        _ = weight * forward * backward
        _ = layer.decay * (1 - forward) * weight

    return step


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "", "mask_work")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--fused", action="store_true", help="fused optimizers for the scores, ours and the published layer's")
    options = parser.parse_args(argv)
    fused = True if options.fused else None
    torch.set_num_threads(options.threads)
    started, clock = environment(options.threads), CLOCKS[options.clock]
    repeats, body, rows = (3 if options.quick else 15), {}, []
    for text in PATTERNS:
        pattern, grad = nm.Pattern.parse(text), torch.randn(SIZE, SIZE)
        (lbc, retire), (bimask, _) = ours(nm.LBC(), text, grad, fused=fused), ours(nm.BiMask(), text, grad)
        work = {
            "copy": lambda: torch.empty(SIZE, SIZE).copy_(grad),  # noqa: B023
            "LBC": lbc,
            "LBC as published": published_lbc(pattern, grad, fused=fused),
            "BiMask": bimask,
            "Bi-Mask as published": published_bimask(pattern),
        }
        found: dict[str, Spread] = interleaved(work, repeats=repeats, warmup=2, clock=clock)
        retire()  # its kernel is compiled
        due = seconds(retire, clock) * (pattern.combinations - 1) / SHORT
        gains = {
            "LBC": found["LBC as published"].median / (found["LBC"].median + due),
            "BiMask": found["Bi-Mask as published"].median / found["BiMask"].median,
        }
        body[text] = {"seconds": {k: v.as_json() for k, v in found.items()}, "retire_per_step": due, "times_less": gains}
        cells = [f"{1e3 * found[name].median:.2f}" for name in work]
        rows.append(
            [text, *cells[:2], f"{1e3 * due:.2f}", cells[2], f"{gains['LBC']:.1f}x", *cells[3:], f"{gains['BiMask']:.1f}x"]
        )
    head = ["pattern", "copy ms", "LBC ms", "retiring", "published", "times less", "BiMask ms", "published", "times less"]
    print(table(head, rows))
    write(options.out, started, {"clock": options.clock, "fused": options.fused, "size": SIZE, "patterns": body})


if __name__ == "__main__":
    main(sys.argv[1:])
