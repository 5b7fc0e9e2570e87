"""Calibration leaves out what an attention mask calls padding, and names weights that may have met some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nm_compiler as nm


class Block(nn.Module):
    """Tokens through attention, a choice of rows for two experts, and a sum over tokens; positions are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.experts, self.mix = nn.Parameter(torch.randn(2, 16, 16) / 4), nn.Parameter(torch.randn(16, 16) / 4)
        self.pool, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def attended(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, 2, 8).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)).masked_fill(attention_mask[:, None, None] == 0, -1e9)
        y: Tensor = x + self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(batch, length, width))
        return y

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.attended(tokens, attention_mask)
        rows = x.view(-1, x.shape[-1])
        order = rows[:, 0].argsort(descending=True)
        half = len(order) // 2
        mixed = torch.cat([rows[order[:half]] @ self.experts[0], rows[order[half:]] @ self.experts[1]])
        y = torch.zeros_like(rows).index_add(0, order, torch.relu(mixed)).view(x.shape)
        y = torch.addmm(self.norm.bias, (x + y).flatten(0, 1), self.mix).view(x.shape)
        mask = attention_mask[..., None].to(x.dtype)
        pooled: Tensor = self.head(torch.relu(self.pool((y * mask).sum(1) / mask.sum(1))))
        return pooled


def padded(left: bool = False) -> tuple[Tensor, Tensor]:
    """Three sequences of six tokens at most, and their mask."""
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0]])
    mask = mask.flip(1) if left else mask
    return torch.randint(1, 12, (3, 6)) * mask, mask


@pytest.mark.ci(here=["right"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padded_positions_are_not_measured(left: bool, caplog: Any) -> None:
    model, (tokens, mask) = Block().eval(), padded(left)
    stats = nm.calibrate(model, [{"tokens": tokens, "attention_mask": mask}])
    assert not caplog.records
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda layer, given: seen.__setitem__(name, given[0].detach().double().square())

    for name in ("qkv", "out", "pool", "head"):
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    model(tokens, mask)
    one = torch.ones(1, 1)
    counted = {"qkv": mask[..., None], "out": mask[..., None], "pool": one, "head": one}
    for name, mine in counted.items():
        expected = (seen[name] * (mine > 0)).flatten(0, -2).sum(0)
        torch.testing.assert_close(stats[f"{name}.weight"][0], expected, rtol=1e-5, atol=1e-6)
    rows = model.attended(tokens, mask).detach().flatten(0, 1).double()
    halves = rows[:, 0].argsort(descending=True).chunk(2)
    for at, half in enumerate(halves):  # whose rows of padding lie among the others
        expected = (rows[half].square() * mask.flatten()[half, None]).sum(0)
        torch.testing.assert_close(stats["experts"][at, :, 0], expected, rtol=1e-5, atol=1e-6)


def test_weights_that_may_have_met_padding_are_named(caplog: Any) -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.last = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, stride=2), nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = self.last(self.conv(self.first(x).transpose(1, 2)).transpose(1, 2))
            return y

    model, (_, mask) = Convolved(), padded()
    x = torch.randn(3, 6, 8)
    stats = nm.calibrate(model, [(x, mask)])
    told = "last.weight: measured with padding among the tokens, which could not be followed there"
    assert told in caplog.text
    expected = (x.double().square() * mask[..., None]).sum((0, 1))
    torch.testing.assert_close(stats["first.weight"][0], expected, rtol=1e-5, atol=1e-6)


class Translating(nn.Module):
    """One sequence looks at another."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.cross = (nn.Embedding(12, 8) for _ in range(3))
        self.key, self.query, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Any = None
    ) -> Tensor:
        memory, x = self.key(self.source(input_ids)), self.query(self.target(decoder_input_ids))
        scores = (x @ memory.mT).masked_fill(attention_mask[:, None] == 0, -1e9)
        y: Tensor = self.out(torch.softmax(scores, -1) @ memory)
        return y


@pytest.mark.ci
def test_a_decoders_padding_is_that_of_its_own_mask(caplog: Any) -> None:
    model, (tokens, mask) = Translating(), padded()
    other = mask.flip(1)
    batch = {"decoder_input_ids": tokens.flip(1), "input_ids": tokens, "attention_mask": mask}
    x, memory = model.target(batch["decoder_input_ids"]).double().square(), model.source(tokens).double().square()
    for given, expected in ((batch, x), ({**batch, "decoder_attention_mask": other}, x * other[..., None])):
        stats = nm.calibrate(model, [given])
        torch.testing.assert_close(stats["query.weight"][0], expected.sum((0, 1)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats["key.weight"][0], (memory * mask[..., None]).sum((0, 1)), rtol=1e-5, atol=1e-6)
    assert not caplog.records
