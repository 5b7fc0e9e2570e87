"""Several runs at once in one process: a step of each in turn, on a CUDA stream of its own.

Processes that share a GPU take turns on it. Streams of one process overlap, which matters where a kernel of a small network
does not fill the GPU: on an H200 a step of a double-width ResNet-32 takes 5.9 ms by itself and 4.4 ms beside 13 others.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reproduction.grid import Cell, Recipe
from reproduction.images import Images
from reproduction.pool import END_S, LOOKS, MEASURE_S, SLACK, Place, Say
from reproduction.training import Training


@dataclass
class _Run:
    training: Training
    stream: torch.cuda.Stream | None
    steps: Generator[None]
    look_s: float = 0.0
    search_s: float = 0.0


def run_together(
    cells: Sequence[Cell], recipe: Recipe, place: Place, prepare: Callable[[], Path], say: Say, *, deadline: float | None
) -> list[Cell]:
    """Run all cells, which have to fit into the device's memory together. Returns those that failed.

    deadline: of `time.monotonic`; the number of epochs is chosen to meet it.
    """
    device = torch.device(place.device)
    torch.set_num_threads(place.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images = Images.load(prepare(), device, recipe.channels_last)
    say("images ready")
    runs, failed = list[_Run](), list[Cell]()
    for cell in cells:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                runs.append(_made(cell, recipe, device, place, images, stream))
        except Exception:
            failed.append(cell)
            say(f"{cell.name} FAILED\n{traceback.format_exc()[-3000:]}")
    if not runs:
        raise SystemExit("every run failed before its first epoch")
    epochs = recipe.epochs
    if deadline is not None:
        epochs = _epochs_in(runs, device, deadline, say)
    begin = time.monotonic()
    for run in runs:
        run.steps = run.training.steps(epochs)
    while runs:
        for run in list(runs):
            cell = run.training.cell
            try:
                with torch.cuda.stream(run.stream):
                    ended = next(run.steps, True) is True
            except Exception:
                failed.append(cell)
                runs.remove(run)
                say(f"{cell.name} FAILED\n{traceback.format_exc()[-3000:]}")
                continue
            if ended:
                runs.remove(run)
                found = run.training.found
                say(f"{cell.name}: {found.accuracy:.2%} after {time.monotonic() - begin:.0f} s, {found.how}")
    return failed


def _made(
    cell: Cell, recipe: Recipe, device: torch.device, place: Place, images: Images, stream: torch.cuda.Stream | None
) -> _Run:
    training = Training(cell, recipe, device, place.folder, graphs=place.graphs)
    training.attach(images)
    training.accuracy()  # settles its libraries
    begin = time.perf_counter()
    training.accuracy()
    look = time.perf_counter() - begin
    return _Run(training, stream, training.rehearse(), look, training.search_seconds())


def _epochs_in(runs: Sequence[_Run], device: torch.device, deadline: float, say: Say) -> float:
    """As many, in tenths and at least one, as all runs can have before the deadline."""
    rounds, begin, now = 0, time.perf_counter(), 0.0
    while now < MEASURE_S:
        for _ in range(5):
            for run in runs:
                with torch.cuda.stream(run.stream):
                    next(run.steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds, now = rounds + 5, time.perf_counter() - begin
    for run in runs:
        with torch.cuda.stream(run.stream):
            run.steps.close()
    interval, per_epoch = runs[0].training.recipe.interval, runs[0].training.per_epoch
    of_round = now / rounds + sum(run.search_s for run in runs) / interval
    left = SLACK * (deadline - time.monotonic() - END_S) - sum((LOOKS + 1) * run.look_s for run in runs)
    epochs = max(1.0, int(10 * left / (per_epoch * of_round)) / 10)
    for run in runs:
        cell, how = run.training.cell, run.training.found.how
        say(f"{cell.name}: a search takes {run.search_s:.3f} s, a look {run.look_s:.3f} s, {how}")
    say(f"{1000 * of_round / len(runs):.2f} ms a step, searches included: {epochs:.1f} epochs each, for {left:.0f} s")
    return epochs
