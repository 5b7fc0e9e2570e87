"""Order search over whole networks: what `nm.compile(permute="search")` keeps more, and how long it takes.

    python benchmarks/permute_nets.py [--quick] [--budget 8]

ResNet-50 and ViT-B/16, 2:4, all classes, on all cores. Weights: as initialised, and made like trained ones (low rank, heavy
tails, rows and channels of unequal scale; baselines/matrices.py). The function before masking is checked in float64.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from baselines.matrices import trained
from harness import arguments, environment, table, write
from networks import ResNet50, ViTB16
from torch import nn

import nm_compiler as nm

NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {"ResNet-50": (ResNet50, 20.0), "ViT-B/16": (ViTB16, 30.0)}
"""With the seconds that `nm.compile` may take in all, on two cores."""


def like_trained(model: nn.Module) -> nn.Module:
    """Give every weight of two or more axes the structure of a trained one, its norm kept."""
    with torch.no_grad():
        for seed, weight in enumerate(p for p in model.parameters() if p.ndim >= 2 and p.shape[1] >= 8):
            last = weight.movedim(1, -1)
            values = torch.from_numpy(trained(last.shape[:-1].numel(), last.shape[-1], seed))
            values *= torch.randint(0, 2, values.shape).mul_(2).sub_(1)
            weight.copy_((values * (weight.norm() / values.norm())).reshape(last.shape).movedim(-1, 1))
    return model


def measure(model: nn.Module, x: torch.Tensor, budget_s: float | None) -> dict[str, Any]:
    """Seconds of all of `nm.compile`, what the classes gain, and by how much the outputs differ in float64."""
    plain = copy.deepcopy(model)
    begin = time.perf_counter()
    permutation = nm.permute(model, (x,), budget_s=budget_s)
    permute_s = time.perf_counter() - begin
    with torch.no_grad():
        wanted, found = (each.double().eval()(x.double()) for each in (copy.deepcopy(plain), copy.deepcopy(model)))
    begin = time.perf_counter()
    sparse = nm.compile(plain, (x,), permute="search", budget_s=budget_s)
    compile_s = time.perf_counter() - begin
    before, after = (sum(share[k] for share in permutation.retained.values()) / len(permutation.retained) for k in (0, 1))
    return {
        "compile_seconds": compile_s, "permute_seconds": permute_s, "error": float((found - wanted).norm() / wanted.norm()),
        "weights": len(sparse.plan.sites), "classes": len(permutation.gains),
        "retained_before": before, "retained_after": after,
        "gains": [{"class": g.name, "size": g.size, "before": g.before, "after": g.after} for g in permutation.gains],
    }  # fmt: skip


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "", "permute_nets")
    parser.add_argument("--budget", type=float, default=None, help="seconds of search; without: the default amount of work")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    started, rows, body = environment(options.threads), [], []
    nm.permute(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), (torch.randn(2, 8),), budget_s=0.01
    )  # compiles the kernels
    x = torch.randn(2, 3, 224, 224)
    for name, (build, bound) in NETWORKS.items():
        for weights, change in (("initialised", lambda model: model), ("like trained", like_trained)):
            torch.manual_seed(0)
            found = measure(change(build()), x, 0.5 if options.quick else options.budget)
            body.append({"network": name, "values": weights, "bound_s": bound, **found})
            rows.append([
                f"{name}, {weights}", str(found["weights"]), str(found["classes"]), f"{found['retained_before']:.4f}",
                f"{found['retained_after']:.4f}", f"{found['error']:.0e}", f"{found['permute_seconds']:.1f}",
                f"{found['compile_seconds']:.1f}", f"{bound:.0f} {'met' if found['compile_seconds'] <= bound else 'MISSED'}",
            ])  # fmt: skip
    head = ["2:4", "weights", "classes", "kept before", "after", "error", "permute s", "compile s", "bound s"]
    print(table(head, rows))
    write(options.out, started, {"budget": options.budget, "networks": body})


if __name__ == "__main__":
    main(sys.argv[1:])
