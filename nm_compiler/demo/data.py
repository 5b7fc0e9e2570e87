"""The images: scikit-learn's digits, or CIFAR-10 (`cifar`), and the batches every contestant is given alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nm_compiler.demo import cifar
from nm_compiler.demo.settings import Settings


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images uint8 ``[count, channels, height, width]``, labels int64 ``[count]``; the test images are never trained on.

    pad: pixels that a random crop may move an image; flip: whether its mirror image means the same.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    pad: int
    flip: bool
    mean: Tensor
    deviation: Tensor

    def normal(self, images: Tensor) -> Tensor:
        """Floats, of mean 0 and deviation 1 in every channel over the training images."""
        return (images.float() - self.mean) / self.deviation

    def to(self, device: str) -> Dataset:
        """The same images on a device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self) if field.type == "Tensor"}
        return replace(self, **moved)


def load(settings: Settings) -> Dataset:
    """The data that the settings name. Raises NMError for a path that cannot be read."""
    if settings.data is None:
        return digits(settings.limit)
    return _dataset("CIFAR-10", *cifar.load(settings.data, settings.limit), pad=4, flip=True)


def digits(limit: int | None = None) -> Dataset:
    """1,797 scanned digits of 8x8 pixels, 40 % held out for the test, every class in proportion; the same split always."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    kept, held = train_test_split(range(len(labels)), test_size=0.4, random_state=0, stratify=bunch.target)
    return _dataset(
        "digits", images[kept[:limit]], labels[kept[:limit]], images[held[:limit]], labels[held[:limit]], pad=1, flip=False
    )


def batches(data: Dataset, size: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, cropped and normalised batches of one size, the same ones for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.train), generator=generator)
        for start in range(0, steps_per_epoch(data, size) * size, size):
            chosen = order[start : start + size].to(data.train.device)
            images = augmented(data.train[chosen], data.pad, flip=data.flip, generator=generator)
            yield data.normal(images), data.train_labels[chosen]


def steps_per_epoch(data: Dataset, size: int) -> int:
    """Full batches only: every step sees the same number of images (fewer than one batch makes one step)."""
    return max(1, len(data.train) // size)


def augmented(images: Tensor, pad: int, *, flip: bool, generator: torch.Generator) -> Tensor:
    """Every image moved by up to ``pad`` pixels, black where nothing is, and mirrored half the time if ``flip``."""
    count, _, height, width = images.shape
    device = images.device
    moved = torch.randint(2 * pad + 1, (2, count, 1), generator=generator).to(device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device) & flip
    rows = moved[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, -1)
    columns = moved[1] + torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    which = torch.arange(count, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _dataset(
    name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, pad: int, flip: bool
) -> Dataset:
    deviation, mean = torch.std_mean(train[:10_000].float(), (0, 2, 3), keepdim=True)
    return Dataset(name, train, train_labels, test, test_labels, pad, flip, mean, deviation)
