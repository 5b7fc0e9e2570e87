"""Train a small CNN on handwritten digits with 2:4 weights; stop it, start it again, and it goes on where it was.

    python examples/train_cnn.py                                  # 600 steps
    python examples/train_cnn.py --method LBC --pattern 1:4
    python examples/train_cnn.py --checkpoint run.pt --stop-at 300    # as if the power went
    python examples/train_cnn.py --checkpoint run.pt                  # goes on at step 300

The digits ship with scikit-learn: pip install "nm_compiler[demo]".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nm_compiler as nm

METHODS = {method.__name__: method for method in (nm.LBC, nm.BiMask, nm.SRSTE, nm.Magnitude)}


def network() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    blocks = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *block(64, 128, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="BiMask")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--stop-at", type=int, help="save the checkpoint after this step and leave")
    parser.add_argument("--checkpoint", type=Path, help="read if it exists; written every 100 steps")
    options = parser.parse_args(arguments)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_images, train_labels, test_images, test_labels = images[:1500], labels[:1500], images[1500:], labels[1500:]

    torch.manual_seed(0)
    sparse = nm.compile(network(), (train_images[:8],), pattern=options.pattern, method=METHODS[options.method]())
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    sparsity = nm.SparsityScheduler(sparse, total_steps=options.steps)
    parts = {"model": sparse, "optimizer": optimizer, "learning_rate": learning_rate, "sparsity": sparsity}
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        print(f"going on at step {sparsity.last_step}")

    end = min(options.stop_at or options.steps, options.steps)
    sparse.train()
    for step in range(sparsity.last_step, end):
        batch = torch.randint(len(train_images), (64,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(sparse(train_images[batch]), train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        sparsity.step()  # after optimizer.step(), like a learning-rate scheduler
        if options.checkpoint and ((step + 1) % 100 == 0 or step + 1 == end):
            torch.save({name: part.state_dict() for name, part in parts.items()}, options.checkpoint)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.3f}")
    if end < options.steps:
        return sparse

    print(nm.report(sparse), end="\n\n")
    model = nm.freeze(sparse)  # the plain network again, zeros in its weights
    print(nm.verify(model, options.pattern))
    print(f"test accuracy {accuracy(model, test_images, test_labels):.1%}")
    return model


if __name__ == "__main__":
    main()
