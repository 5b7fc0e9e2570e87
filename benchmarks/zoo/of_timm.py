"""One model of every file of timm: the one with the fewest parameters.

    PYTHONPATH=benchmarks python -m zoo.of_timm     # counts all models again and rewrites timm.json; three minutes

timm has 98 files of models. Counting the parameters of all 1,300 takes three minutes even without memory behind them, so what
the rule chose for the pinned version lies in ``timm.json``: ``{file: [model, model for tests]}``. Models that timm has
only for its own tests are not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from zoo.entry import Built, Entry
from zoo.shim import declare_missing_operators
from zoo.shrink import cut, first_that_runs, within_bounds

CHOSEN = Path(__file__).with_name("timm.json")
SMALL = 64
_FOR_TESTS = "test_"


def entries() -> list[Entry]:
    """One entry a file of timm, named after the file."""
    chosen: dict[str, list[str]] = json.loads(CHOSEN.read_text())
    return [
        Entry("timm", file, partial(_build, measured), partial(_small, tested)) for file, (measured, tested) in chosen.items()
    ]


def choose() -> dict[str, list[str]]:
    """The rule: of each file the model with the fewest parameters, without and with timm's test models."""
    declare_missing_operators()
    import timm

    chosen = {}
    for file in timm.list_modules():
        counted = sorted(_counted(file))
        chosen[file] = [next(name for _, name in counted if not name.startswith(_FOR_TESTS)), counted[0][1]]
    return chosen


def _counted(file: str) -> Iterator[tuple[int, str]]:
    import timm

    for name in timm.list_models(module=file):
        with torch.device("meta"):
            yield sum(parameter.numel() for parameter in timm.create_model(name).parameters()), name


def _build(name: str) -> Built:
    return _with_images(within_bounds(_model(name)), _own_size(name))


def _small(name: str) -> Built:
    return first_that_runs(
        [
            lambda: _with_images(cut(_model(name, img_size=SMALL)), SMALL),  # models with one position per patch
            lambda: _with_images(cut(_model(name)), SMALL),
            lambda: _with_images(cut(_model(name)), _own_size(name)),
            lambda: _with_images(_model(name), _own_size(name)),
        ]
    )


def _model(name: str, **options: int) -> nn.Module:
    declare_missing_operators()
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _own_size(name: str) -> int:
    import timm

    return int(timm.get_pretrained_cfg(name).input_size[-1])


def _with_images(model: nn.Module, size: int) -> Built:
    return model, (torch.randn(2, 3, size, size),), {}


if __name__ == "__main__":
    CHOSEN.write_text(json.dumps(choose(), indent=0) + "\n")
