# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Five real architectures, small: what is lowered is tested on them. Import only where the zoo is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo.shim import declare_missing_operators

import nm_compiler as nm

declare_missing_operators()  # before torchvision, which transformers imports as well

import torchvision  # noqa: E402
import transformers  # noqa: E402


class Logits(nn.Module):
    """A Hugging Face model with a tensor in and a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, return_dict=True)[0]


def resnet18() -> tuple[nn.Module, Tensor]:
    """Half of its blocks: one with and three without an identity beside the convolutions."""
    resnet = torchvision.models.resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), torch.randn(2, 3, 64, 64)


def mobilenet_v2() -> tuple[nn.Module, Tensor]:
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2]]  # expansion, channels, how many, stride
    return torchvision.models.mobilenet_v2(inverted_residual_setting=blocks), torch.randn(2, 3, 64, 64)


def vit() -> tuple[nn.Module, Tensor]:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model, torch.randn(2, 3, 32, 32)


def bert() -> tuple[nn.Module, Tensor]:
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=96
    )
    return Logits(transformers.BertForMaskedLM(config)), torch.randint(0, 96, (2, 8))


def llama() -> tuple[nn.Module, Tensor]:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, use_cache=False,
    )  # fmt: skip
    return Logits(transformers.LlamaForCausalLM(config)), torch.randint(0, 96, (2, 8))


def pruned(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model frozen at 2:4, batch norms with statistics worth folding, and its planned weights."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    sparse = nm.compile(model, (x,), method=nm.Magnitude(), **options)
    sites = {site.name: site for site in sparse.plan.sites}
    return nm.freeze(sparse).eval(), sites


@functools.cache
def frozen_net(make: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """One of `NETS` `pruned`, its input and its planned weights: once a process, so nobody may change it."""
    torch.manual_seed(0)
    model, x = make()
    model, sites = pruned(model, x)
    return model, x, sites


NETS = (resnet18, mobilenet_v2, vit, bert, llama)
