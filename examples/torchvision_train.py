"""The recipe of torchvision's classification models (SGD, cosine, label smoothing, mixup, averaged weights), with N:M weights.

    python examples/torchvision_train.py /data/imagenet --model resnet50 --amp            # folders train/ and val/
    python examples/torchvision_train.py --fake --model resnet18 --image-size 32   # random images: to see that it runs

The lines that nm_compiler adds end in "# nm"; without them this is a dense training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

import nm_compiler as nm


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="a folder that holds train/ and val/, a folder a class")
    parser.add_argument("--fake", action="store_true", help="64 random images of 10 classes")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=176)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--weight-decay", type=float, default=2e-5)
    parser.add_argument("--ema-decay", type=float, default=0.9999)
    parser.add_argument("--amp", action="store_true", help="float16 with a loss scale on a GPU, bfloat16 on a CPU")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--then", default="inductor", help="what runs the sparse graphs: inductor, aot_eager, eager")
    parser.add_argument("--out", type=Path, help="the state_dict of the averaged model goes here")
    return parser.parse_args(arguments)


def transform(size: int, *, training: bool) -> v2.Transform:
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]
    whole = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return v2.Compose([*(crop if training else whole), *end, *([v2.RandomErasing(0.1)] if training else [])])


def loaders(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """Of training and validation images, and how many classes there are. Training batches come mixed, labels as shares."""
    size, datasets = options.image_size, list[Any]()
    for name in ("train", "val"):
        how = transform(size, training=name == "train")
        if options.fake:
            datasets.append(torchvision.datasets.FakeData(64, (3, size, size), 10, how))
        else:
            datasets.append(torchvision.datasets.ImageFolder(options.data / name, how))
    classes = 10 if options.fake else len(datasets[0].classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])
    shared = {"batch_size": options.batch_size, "num_workers": options.workers}
    train = DataLoader(datasets[0], shuffle=True, drop_last=True, collate_fn=partial(mixed, mix), **shared)
    return train, DataLoader(datasets[1], **shared), classes


def mixed(mix: v2.Transform, rows: list[Any]) -> Any:
    """A batch of ``rows``, images and labels mixed."""
    return mix(*default_collate(rows))


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: norms and biases do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0},
    ]


@torch.no_grad()
def validate(model: nn.Module, loader: Any, device: torch.device) -> float:
    """The share of images whose class comes first."""
    model.eval()
    right = [model(images.to(device)).argmax(1) == labels.to(device) for images, labels in loader]
    return float(torch.cat(right).double().mean())


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    options = options_of(arguments)
    device = torch.device(options.device)
    train, valid, classes = loaders(options)

    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, num_classes=classes).to(device, memory_format=torch.channels_last)
    model = nm.compile(model, then=options.then)  # nm
    optimizer = torch.optim.SGD(decayed(model, options.weight_decay), lr=options.lr, momentum=0.9, nesterov=True)
    nm.SparsityScheduler(model, total_steps=options.epochs * len(train)).follow(optimizer)  # nm
    warm = min(options.warmup_epochs, options.epochs - 1)
    parts = [LinearLR(optimizer, 0.01, total_iters=max(warm, 1)), CosineAnnealingLR(optimizer, options.epochs - warm)]
    schedule = SequentialLR(optimizer, parts, [warm]) if warm else parts[1]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp and device.type == "cuda")
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    for epoch in range(options.epochs):
        model.train()
        loss = torch.zeros(())
        for images, labels in train:
            images = images.to(device, memory_format=torch.channels_last)
            loss = step(model, images, labels.to(device), criterion, optimizer, scaler, half if options.amp else None)
            average.update_parameters(model)
        schedule.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}  top-1 {validate(model, valid, device):.1%}")

    final = average.module
    final = nm.freeze(final)  # nm
    torch.optim.swa_utils.update_bn((images.to(device) for images, _ in valid), final)  # averages have no statistics yet
    print(f"averaged  top-1 {validate(final, valid, device):.1%}")
    if options.out:
        torch.save(final.state_dict(), options.out)
    return final


def step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    half: torch.dtype | None,
) -> Tensor:
    """One step of the optimizer; the masks follow it."""
    with torch.autocast(images.device.type, half, enabled=half is not None):
        loss: Tensor = criterion(model(images), labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


if __name__ == "__main__":
    main()
