"""What training N:M costs in memory: state beside the weights, optimizer state, and what a step keeps for its backward pass.

    python benchmarks/training_memory.py

Bytes are counted, not sampled: parameters and buffers by their sizes, saved tensors as autograd asks for them (each memory
once). So the numbers are the same on every machine. Beside them, the layers that the papers released.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
from harness import against, arguments, environment, table, write
from networks import ResNet20, Transformer
from published import PublishedBiMask, PublishedLBC, replace
from torch import Tensor, nn
from torch.nn import functional

import nm_compiler as nm
from nm_compiler.state.beside import RECIPE

PATTERNS = ("2:4", "4:8", "1:16")


def saved_bytes(model: nn.Module, x: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> int:
    """What autograd keeps between the forward and the backward pass of a step, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.cross_entropy(model(x), labels).backward()
    optimizer.step()
    return sum(kept.values())


def measured(model: nn.Module, x: Tensor, labels: Tensor, dense: nn.Module, weights: Collection[str]) -> dict[str, float]:
    """Extra bytes a planned weight, by kind, and bytes saved for the backward pass."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    saved = saved_bytes(model, x, labels, optimizer)
    count = sum(dense.get_parameter(name).numel() for name in weights)
    before = sum(t.nbytes for t in (*dense.parameters(), *dense.buffers()))
    learned = sum(p.nbytes for p in model.parameters() if p.requires_grad) - sum(p.nbytes for p in dense.parameters())
    tag = sum(buffer.nbytes for name, buffer in model.named_buffers() if name == RECIPE)  # of the model, not of its weights
    state = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - before - learned - tag
    momenta = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    return {
        "scores": learned / count,
        "momenta": (momenta - sum(p.nbytes for p in dense.parameters())) / count,
        "other": state / count,
        "saved_mib": saved / 2**20,
    }


def bound_of(name: str, pattern: nm.Pattern) -> float | None:
    """Of the state besides scores: LBC ceil(C / 8) bytes a group, Bi-Mask 2 bits a weight."""
    if name == "LBC":
        return math.ceil(pattern.combinations / 8) / pattern.m
    return 0.25 if name == "BiMask" else None


def main(argv: Sequence[str]) -> None:
    """Count, print, write."""
    parser = arguments("Memory of training beside dense training", "training_memory")
    options = parser.parse_args(argv)
    started, body = environment(options.threads), dict[str, Any]()
    torch.manual_seed(0)
    works = {
        "resnet20": (ResNet20(), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
        "transformer": (Transformer(), torch.randint(1024, (32, 128)), torch.randint(1024, (32 * 128,))),
    }
    for work, (model, x, labels) in works.items():
        for pattern in map(nm.Pattern.parse, PATTERNS):
            plan = nm.compile(copy.deepcopy(model), (x,), pattern=str(pattern))
            weights = [weight.site.name for weight in plan.weights]
            makers: dict[str, nn.Module] = {"dense": copy.deepcopy(model)}
            for name, method in {"LBC": nm.LBC(), "BiMask": nm.BiMask(), "SRSTE": nm.SRSTE()}.items():
                makers[name] = nm.compile(copy.deepcopy(model), (x,), pattern=str(pattern), method=method)
            makers["LBC as published"], makers["Bi-Mask as published"] = copy.deepcopy(model), copy.deepcopy(model)
            n, m = pattern.n, pattern.m
            replace(makers["LBC as published"], weights, lambda layer, n=n, m=m: PublishedLBC(layer, n, m))  # type: ignore[misc]
            replace(makers["Bi-Mask as published"], weights, lambda layer, n=n, m=m: PublishedBiMask(layer, n, m, 1))  # type: ignore[misc]
            found = {name: measured(each, x, labels, model, weights) for name, each in makers.items()}
            rows = [
                [name, f"{f['scores']:.2f}", f"{f['momenta']:.2f}", f"{f['other']:.3f}",
                 against(f["other"], bound_of(name, pattern)),
                 f"{f['saved_mib']:.0f}", f"{f['saved_mib'] - found['dense']['saved_mib']:+.0f}"]
                for name, f in found.items()
            ]  # fmt: skip
            head = ["", "scores B/weight", "momenta", "other state", "bound", "saved MiB", "over dense"]
            print(f"\n{work}, {pattern}\n{table(head, rows)}")
            body[f"{work} {pattern}"] = found
    write(options.out, started, body)


if __name__ == "__main__":
    main(sys.argv[1:])
