"""CIFAR-10 as uint8 on the device: shuffled, cropped and mirrored there, so that no loader stands in the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nm_compiler.demo import cifar

SIDE, PAD = 32, 4
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_EPOCHS = 100_003  # a generator for each epoch of each seed: training can go on from any of them


def prepare(data: Path, cache: Path, limit: int | None) -> Path:
    """Decode the images once, about 5 seconds. Returns the file that `Images.load` reads.

    Raises NMError for a path that cannot be read.
    """
    kind = f"{data.stem}-{data.stat().st_size}" if data.is_file() else data.name
    made = cache / f"{kind}-{limit or 'all'}.pt"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        parts = cifar.load(data, limit)
        half = made.with_suffix(f".{os.getpid()}.half")
        torch.save(parts, half)
        half.replace(made)
    return made


@dataclass(frozen=True, slots=True)
class Images:
    """train: uint8 ``[count, 40, 40, 3]``, black around; test: uint8 ``[count, 32, 32, 3]``; labels int64."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    mean: Tensor
    deviation: Tensor
    channels_last: bool

    @classmethod
    def load(cls, prepared: Path, device: torch.device, channels_last: bool) -> Images:
        """From the file that `prepare` made."""
        train, labels, test, wanted = torch.load(prepared, mmap=True)
        padded = functional.pad(train.to(device), (PAD, PAD, PAD, PAD)).permute(0, 2, 3, 1).contiguous()
        seen = test.to(device).permute(0, 2, 3, 1).contiguous()
        mean, deviation = (255 * torch.tensor(value, device=device) for value in (MEAN, DEVIATION))
        return cls(padded, labels.to(device), seen, wanted.to(device), mean, deviation, channels_last)

    def steps(self, batch: int) -> int:
        """Full batches of an epoch; the rest of the images waits for the next."""
        return max(1, len(self.train) // batch)

    def epoch(self, batch: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``[batch, 3, 32, 32]`` and labels in random order, moved by up to 4 pixels, half mirrored."""
        device = self.train.device
        generator = torch.Generator(device).manual_seed(seed * _EPOCHS + epoch)
        count, within = len(self.train), torch.arange(SIDE, device=device)
        order = torch.randperm(count, generator=generator, device=device)
        shifts = torch.randint(0, 2 * PAD + 1, (2, count, 1), generator=generator, device=device)
        mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
        down, across = shifts[0] + within, shifts[1] + torch.where(mirrored, within.flip(0), within)
        for index in range(self.steps(batch)):
            part = slice(index * batch, (index + 1) * batch)
            chosen = order[part]
            pixels = self.train[chosen[:, None, None], down[part][:, :, None], across[part][:, None, :]]
            yield self.normal(pixels), self.labels[chosen]

    def normal(self, pixels: Tensor) -> Tensor:
        """uint8 ``[batch, height, width, 3]`` to floats ``[batch, 3, height, width]``."""
        images = ((pixels - self.mean) / self.deviation).permute(0, 3, 1, 2)
        return images if self.channels_last else images.contiguous()
