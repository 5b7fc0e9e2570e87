"""Several runs at once, each in a process of its own, and how many epochs of all of them end in a given time.

A process goes through: build and compile (no data needed, so the images are decoded meanwhile), attach the images, measure
its speed while all the others measure theirs, train. The speeds of the first processes decide for all.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from reproduction.grid import Cell, Recipe

Say = Callable[[str], None]
LOOKS = 6  # accuracies in a curve, at most, the last one included
MEASURE_S = 6.0  # how long every first process measures its speed
SLACK = 0.93  # of the time that is left is planned with
END_S = 8.0  # kept for freezing, testing and writing


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one kind of run while the machine is full: optimizer steps a second, and seconds for one look at the test images."""

    steps_per_s: float
    look_s: float

    def seconds(self, epochs: float, per_epoch: int) -> float:
        """How long a run of so many epochs takes."""
        return epochs * per_epoch / self.steps_per_s + (LOOKS + 1) * self.look_s


@dataclass(frozen=True, slots=True)
class Place:
    """Where runs go, and how they run there."""

    device: str
    folder: Path
    graphs: bool
    threads: int


@dataclass
class _Worker:
    cell: Cell
    process: BaseProcess
    pipe: Connection


def run_all(
    cells: Sequence[Cell], recipe: Recipe, place: Place, prepare: Callable[[], Path], say: Say, *, parallel: int,
    deadline: float | None,
) -> list[Cell]:  # fmt: skip
    """Run every cell, ``parallel`` at a time. prepare: makes the images, called while the first processes start.

    deadline: of `time.monotonic`; the number of epochs is chosen to meet it. Returns the cells that failed.
    """
    spawn = multiprocessing.get_context("spawn")
    waiting, running, failed = list(cells), list[_Worker](), list[Cell]()

    def start() -> _Worker:
        here, there = spawn.Pipe()
        cell = waiting.pop(0)
        process = spawn.Process(target=_work, args=(cell, recipe, place, there), daemon=True)
        process.start()
        there.close()
        running.append(_Worker(cell, process, here))
        return running[-1]

    born = time.monotonic()
    first = [start() for _ in range(min(parallel, len(waiting)))]
    images = prepare()
    say(f"images ready, {len(first)} runs starting")
    epochs, began = recipe.epochs, born
    if deadline is not None:
        speeds = _measured(first, images, failed, say)
        running[:] = [worker for worker in running if worker.cell not in failed]
        per_epoch = max(answer["per_epoch"] for _, answer in speeds)
        known = {(worker.cell.method, worker.cell.pattern): answer["speed"] for worker, answer in speeds}
        left = SLACK * (deadline - time.monotonic() - END_S)
        started = time.monotonic() - born
        epochs = epochs_in(left, known, cells, per_epoch=per_epoch, parallel=parallel, start_s=started)
        for worker, answer in speeds:
            say(f"{worker.cell.name}: {answer['speed'].steps_per_s:.1f} steps/s of {per_epoch} an epoch, {answer['how']}")
        say(f"{epochs:.1f} epochs each, for {left:.0f} s")
        began = time.monotonic()
    for worker in running:
        worker.pipe.send((images, epochs))
    while running:
        for worker in [worker for worker in running if worker.pipe in wait([one.pipe for one in running], timeout=5)]:
            answer = _answer(worker)
            if "error" in answer:
                failed.append(worker.cell)
                say(f"{worker.cell.name} FAILED\n{answer['error']}")
            else:
                say(f"{worker.cell.name}: {answer['accuracy']:.2%} after {time.monotonic() - began:.0f} s, {answer['how']}")
            worker.process.join()
            running.remove(worker)
            if waiting:
                start().pipe.send((images, epochs))
    return failed


def epochs_in(
    seconds: float,
    known: Mapping[tuple[str, str], Speed],
    cells: Sequence[Cell],
    *,
    per_epoch: int,
    parallel: int,
    start_s: float,
) -> float:
    """The most epochs, in tenths and at least one, that all cells can have so that the last of them ends within ``seconds``.

    Cells are taken in order by whichever place is free; all but the first need ``start_s`` to start. One that was not
    measured is taken for the slowest that was.
    """
    slowest = min(known.values(), key=lambda speed: speed.steps_per_s)

    def end(epochs: float) -> float:
        places = [0.0] * parallel
        for index, cell in enumerate(cells):
            speed = known.get((cell.method, cell.pattern), slowest)
            heapq.heapreplace(places, places[0] + speed.seconds(epochs, per_epoch) + start_s * (index >= parallel))
        return max(places)

    tenths = 10
    while end((tenths + 1) / 10) <= seconds:
        tenths += 1
    return tenths / 10


def _measured(first: Sequence[_Worker], images: Path, failed: list[Cell], say: Say) -> list[tuple[_Worker, dict[str, Any]]]:
    """Let every process build, then all of them measure at the same time."""
    alive = list(first)
    for message in ((images, None), "measure"):  # both are answered by each before the next is said
        for worker in alive:
            worker.pipe.send(message)
        answers = [(worker, _answer(worker)) for worker in alive]
        for worker, answer in answers:
            if "error" in answer:
                failed.append(worker.cell)
                say(f"{worker.cell.name} FAILED\n{answer['error']}")
        answers = [(worker, answer) for worker, answer in answers if "error" not in answer]
        alive = [worker for worker, _ in answers]
    if not alive:
        raise SystemExit("every run failed before its first epoch")
    return answers


def _answer(worker: _Worker) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = worker.pipe.recv()
        return answer
    except EOFError:
        worker.process.join()
        return {"error": f"its process ended with {worker.process.exitcode}"}


def _work(cell: Cell, recipe: Recipe, place: Place, pipe: Connection) -> None:
    try:
        _train(cell, recipe, place, pipe)
    except Exception:
        pipe.send({"error": traceback.format_exc()[-3000:]})


def _train(cell: Cell, recipe: Recipe, place: Place, pipe: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(place.threads))
    import torch

    from reproduction.images import Images
    from reproduction.training import Training

    torch.set_num_threads(place.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(place.device)
    training = Training(cell, recipe, device, place.folder, graphs=place.graphs)
    images, epochs = pipe.recv()
    training.attach(Images.load(images, device, recipe.channels_last))
    if epochs is None:
        training.accuracy()  # settles its libraries too
        pipe.send({"ready": True})
        assert pipe.recv() == "measure"
        begin = time.perf_counter()
        training.accuracy()
        look = time.perf_counter() - begin
        speed = Speed(training.speed(MEASURE_S), look)
        pipe.send({"speed": speed, "per_epoch": training.per_epoch, "how": training.found.how})
        _, epochs = pipe.recv()
    found = training.train(epochs)
    pipe.send({"accuracy": found.accuracy, "how": found.how})
