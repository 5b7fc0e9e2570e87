"""N:M training in a loop of timm's own parts: loader, mixup, optimizer, schedule, averaged weights, AMP.

    python examples/timm_train.py /data/imagenet --model vit_small_patch16_224 --amp      # folders train/ and validation/
    python examples/timm_train.py --fake --model test_vit --image-size 160 --epochs 1     # random images: to see that it runs

The lines that nm_compiler adds end in "# nm"; without them this is a dense training.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy, dispatch_clip_grad
from torch import nn
from torchvision.datasets import FakeData

import nm_compiler as nm


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="?", help="a folder, or a name that timm.data.create_dataset knows, such as torch/cifar10"
    )
    parser.add_argument("--fake", action="store_true", help="64 random images of 10 classes")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=int, default=5)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--ema-decay", type=float, default=0.9998)
    parser.add_argument("--amp", action="store_true", help="float16 with a loss scale on a GPU, bfloat16 on a CPU")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--then", default="inductor", help="what runs the sparse graphs: inductor, aot_eager, eager")
    parser.add_argument("--out", type=Path, help="the state_dict of the averaged model goes here")
    return parser.parse_args(arguments)


def loaders(options: argparse.Namespace) -> tuple[Any, Any]:
    """Of training and validation images."""
    size, device = (3, options.image_size, options.image_size), torch.device(options.device)
    made = []
    for training in (True, False):
        if options.fake:
            dataset: Any = FakeData(64, size, 10, create_transform(size, is_training=training))
        else:
            dataset = create_dataset("", options.data, "train" if training else "validation", is_training=training)
        loader = create_loader(
            dataset, size, options.batch_size, is_training=training, auto_augment="rand-m9-mstd0.5" if training else None,
            num_workers=options.workers, device=device, use_prefetcher=False, persistent_workers=options.workers > 0,
        )  # fmt: skip
        made.append(loader)
    return made[0], made[1]


@torch.no_grad()
def validate(model: nn.Module, loader: Any, device: torch.device, autocast: Any) -> float:
    """The share of images in percent whose class comes first."""
    meter = AverageMeter()
    model.eval()
    for images, labels in loader:
        with autocast():
            outputs = model(images.to(device))
        meter.update(float(accuracy(outputs, labels.to(device))[0]), len(labels))
    return float(meter.avg)


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    options = options_of(arguments)
    device = torch.device(options.device)
    classes = 10 if options.fake else options.classes
    train, valid = loaders(options)
    updates = len(train)

    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=classes).to(device)
    model = nm.compile(model, then=options.then)  # nm
    optimizer = create_optimizer_v2(model, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay)
    schedule, epochs = create_scheduler_v2(
        optimizer, "cosine", options.epochs, warmup_epochs=min(options.warmup_epochs, options.epochs - 1),
        step_on_epochs=False, updates_per_epoch=updates,
    )  # fmt: skip
    nm.SparsityScheduler(model, total_steps=epochs * updates).follow(optimizer)  # nm
    average = ModelEmaV3(model, decay=options.ema_decay, use_warmup=True)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)
    criterion = SoftTargetCrossEntropy()
    scaler = NativeScaler(device.type) if options.amp and device.type == "cuda" else None

    def autocast() -> Any:
        if not options.amp:
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16)

    update = 0
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for images, labels in train:
            images, targets = mixup(images.to(device), labels.to(device))
            with autocast():
                loss = criterion(model(images), targets)
            optimizer.zero_grad()
            if scaler:
                scaler(loss, optimizer, clip_grad=options.clip_grad, parameters=model.parameters())
            else:
                loss.backward()
                dispatch_clip_grad(model.parameters(), options.clip_grad)
                optimizer.step()
            update += 1
            average.update(model, step=update)
            schedule.step_update(update)
            losses.update(loss.item(), len(images))
        schedule.step(epoch + 1)
        right = validate(average.module, valid, device, autocast)
        print(f"epoch {epoch}  loss {losses.avg:.3f}  top-1 of the average {right:.1f} %")

    final = average.module
    final = nm.freeze(final)  # nm
    if options.out:
        torch.save(final.state_dict(), options.out)
    return final


if __name__ == "__main__":
    main()
