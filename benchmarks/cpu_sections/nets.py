"""Whole networks on the same zeros: eager, inductor with frozen weights, on packed weights, and that with inductor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nm_compiler as nm
from cpu_sections.weights import medians

TURN = 0.1
"""Seconds that a network runs again and again before the next one's turn: as it does where it is used."""


def images(batch: int) -> Tensor:
    """For the networks that look at pictures."""
    return torch.randn(batch, 3, 224, 224)


class Hidden(nn.Module):
    """A Hugging Face model with one tensor in and the last hidden states out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model(tokens, return_dict=True)[0]
        return found


class LlamaBlock(nn.Module):
    """The products of one block of a Llama of width 2048, with its attention left out: those have no weights."""

    def __init__(self, width: int = 2048, hidden: int = 5632) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.o(q * torch.sigmoid(k) + v)
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


def _resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50()  # type: ignore[no-any-return]


def _mobilenet() -> nn.Module:
    import torchvision

    return torchvision.models.mobilenet_v2()  # type: ignore[no-any-return]


def _vit() -> nn.Module:
    import torchvision

    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero, which would hide every error
    return model  # type: ignore[no-any-return]


def _bert() -> nn.Module:
    import transformers

    return Hidden(transformers.BertModel(transformers.BertConfig()))


def _words() -> Tensor:
    return torch.randint(0, 1000, (1, 128))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ViT-B/16": (_vit, lambda: images(1)),
    "BERT-base, 128 tokens": (_bert, _words),
    "ResNet-50, batch 1": (_resnet50, lambda: images(1)),
    "ResNet-50, batch 8": (_resnet50, lambda: images(8)),
    "MobileNetV2, batch 1": (_mobilenet, lambda: images(1)),
    **{
        f"Llama-shaped block, {count} tokens": (LlamaBlock, lambda count=count: torch.randn(1, count, 2048))  # type: ignore[misc]
        for count in (1, 8, 64, 512)
    },
}


def net(name: str, pattern: str, *, repeats: int, against: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Medians in ms, and speed-up over inductor and over eager, which runs in both layouts where there are two.

    against: "eager", or "inductor": what `nm.lower` times packed against; where packed loses, the result is dense.
    dtype: of weights and data. Packed is lowered and nothing else; "packed, inductor" is torch.compile of that.
    """
    build, inputs = NETS[name]
    torch.manual_seed(0)
    model, x = build().eval().to(dtype), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    everything = ["*"] if "block" in name else []  # a block of a larger model has neither stem nor head
    model = nm.freeze(nm.compile(model, (x,), pattern=pattern, method=nm.Magnitude(), include=everything)).eval()
    lowered = nm.lower(model, (x,), backend="cpu", pattern=pattern, options={"against": against})
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled, both = torch.compile(model), torch.compile(lowered)
        work: dict[str, Callable[[], object]] = {
            "eager": lambda: model(x), "inductor": lambda: compiled(x), "packed": lambda: lowered(x),
            "packed, inductor": lambda: both(x),
        }  # fmt: skip
        if x.ndim == 4:
            form = torch.channels_last
            turned: Any = copy.deepcopy(model).to(memory_format=form)  # type: ignore[call-overload]
            last = x.contiguous(memory_format=form)
            work["eager, channels last"] = lambda: turned(last)
        for each in work.values():
            each()
        times = medians(work, repeats, TURN)
    decisions = lowered.result.decisions.values()
    eager = min(value for key, value in times.items() if key.startswith("eager"))
    return {
        "net": name, "pattern": pattern, "against": against, "ms": {key: value * 1e3 for key, value in times.items()},
        "over inductor": times["inductor"] / times["packed"], "over eager": eager / times["packed"],
        "compiled over inductor": times["inductor"] / times["packed, inductor"],
        "sparse": sum(1 for each in decisions if each.kernel), "products": len(lowered.result.products),
        "error": lowered.error,
    }  # fmt: skip
