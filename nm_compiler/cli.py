"""The command line: ``nm-compiler demo``, ``verify``, ``report`` and ``prune``. The only module that prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 (verify: the pattern is not satisfied), 2 (a mistake, explained)."""
    options = _parser().parse_args(arguments)
    if not hasattr(options, "command"):
        _parser().print_help()
        return 0
    from nm_compiler.errors import NMError

    try:
        status: int = options.command(options)
        return status
    except NMError as error:
        print(f"nm-compiler: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nm-compiler: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("nm-compiler", description="N:M sparsity for PyTorch models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add = commands.add_parser
    _add_demo(add("demo", help="train one network five ways and write a page about it", description=_DEMO))
    usage = "%(prog)s FILE [options]"  # what is positional comes first: an option that takes several words would take it too
    _add_verify(add("verify", usage=usage, help="say which weights of a checkpoint are N:M", description=_VERIFY))
    usage = "%(prog)s CHECKPOINT_DIR OUT [options]"
    _add_prune(add("prune", usage=usage, help="prune a checkpoint folder of any size in one shot", description=_PRUNE))
    usage = "%(prog)s MODULE:FACTORY --inputs SHAPE [SHAPE ...] [options]"
    _add_report(add("report", usage=usage, help="lower a frozen model and say what is sparse", description=_REPORT))
    return parser


# -- demo --------------------------------------------------------------------------------------------------------------------


_EXTRAS = ("sklearn", "matplotlib", "rich", "PIL")
_DEMO = """Dense, one-shot magnitude, SR-STE, LBC and Bi-Mask on real scanned digits (packaged with scikit-learn), with one
budget; a few minutes on two cores. Prints a table and writes a page of pictures. With --data, the same on CIFAR-10."""


def _add_demo(demo: argparse.ArgumentParser) -> None:
    number: Any = {"type": int, "metavar": "N"}
    demo.add_argument("--quick", action="store_true", help="one seed and fewer steps, to see that it runs")
    demo.add_argument("--data", metavar="PATH", help="CIFAR-10: cifar10_jpeg.npz, or the folder of the python batches")
    demo.add_argument("--model", help="resnet20 (default with --data) or resnet32")
    demo.add_argument("--methods", nargs="+", metavar="NAME", help="of magnitude srste lbc bimask (default all)")
    demo.add_argument("--patterns", nargs="+", metavar="N:M", help="default 2:4 1:4")
    demo.add_argument("--seeds", help="repetitions (default 3)", **number)
    demo.add_argument("--epochs", help="default 25, with --data 100", **number)
    demo.add_argument("--batch-size", help="default 64, with --data 128", **number)
    demo.add_argument("--limit", help="use N training images and at most N test images (default all)", **number)
    demo.add_argument("--device", help="default cpu; with --data cuda where there is one")
    demo.add_argument("--out", type=Path, default=Path("nm_compiler_demo.html"), metavar="FILE", help="default %(default)s")
    demo.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    _check_extras()
    from rich.console import Console

    from nm_compiler.demo.page import page
    from nm_compiler.demo.progress import shown
    from nm_compiler.demo.settings import choose
    from nm_compiler.demo.train import run
    from nm_compiler.files import check_place, write
    from nm_compiler.pattern import Pattern

    patterns = tuple(dict.fromkeys(map(Pattern.parse, options.patterns))) if options.patterns else None
    methods = tuple(dict.fromkeys(options.methods)) if options.methods else None
    settings = choose(
        data=options.data, model=options.model, quick=options.quick, methods=methods, patterns=patterns, seeds=options.seeds,
        epochs=options.epochs, batch_size=options.batch_size, limit=options.limit, device=options.device,
    )  # fmt: skip
    check_place(options.out, "--out")
    with shown(Console(stderr=True)) as progress:
        outcome = run(settings, progress)
    print(outcome)
    write(options.out, page(outcome), "--out")
    print(f"The pictures are in {options.out}")
    return 0


def _check_extras() -> None:
    from importlib.util import find_spec

    from nm_compiler.errors import NMError

    missing = [name for name in _EXTRAS if find_spec(name) is None]
    if missing:
        raise NMError(f"the demo also needs {', '.join(missing)}: pip install 'nm_compiler[demo]'")


# -- verify ------------------------------------------------------------------------------------------------------------------


_VERIFY = """Say of every weight whether it is N:M, and along which axis. Exit status: 0 if at least one weight satisfies the
pattern, and all that --weights names do; 1 if not; 2 if the file cannot be read or has no such weight."""


def _add_verify(check: argparse.ArgumentParser) -> None:
    check.add_argument(
        "file", metavar="FILE", help="a .safetensors, .onnx, .pt, .pth, .bin or .ckpt file, or a folder of shards"
    )
    _add_pattern(check)
    named = "weights that must all satisfy it, by name: 'layer4.*' (default: it is enough that one weight does)"
    check.add_argument("--weights", nargs="+", default=[], metavar="GLOB", help=named)
    check.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from nm_compiler.errors import NMError
    from nm_compiler.pattern import matches
    from nm_compiler.runtime.verify import examine

    patterns = _patterns(options.pattern)
    found = examine(options.file, patterns)
    print(found)
    for glob, pattern in patterns.items():
        if glob != "*" and not any(matches(weight.name, (glob,)) for weight in found.weights):
            raise NMError(f"--pattern {glob}={pattern} matches no weight of {options.file}: globs run over the names above")
    for glob in options.weights:
        if not any(matches(weight.name, (glob,)) for weight in found.weights):
            raise NMError(f"--weights {glob} matches no weight of {options.file}: globs run over the names above")
    failed = [w.name for w in found.weights if matches(w.name, options.weights) and not w.axes]
    if failed:
        print(f"nm-compiler: not {found.pattern}: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or not found.satisfied else 0


# -- prune -------------------------------------------------------------------------------------------------------------------


_PRUNE = """Prune the weight of every linear to the pattern and copy the rest of the folder. Weights pass through memory a few
megabytes at a time. If a run is interrupted, the same command continues it. Exit status: 0, or 2 for a mistake."""


def _add_prune(prune: argparse.ArgumentParser) -> None:
    from nm_compiler.streaming.judging import IMPORTANCES

    prune.add_argument("checkpoint", metavar="CHECKPOINT_DIR", help="with model.safetensors, or shards and their index")
    prune.add_argument("out", metavar="OUT", help="a new folder, or that of an interrupted run")
    _add_pattern(prune)
    rules = f"keep the largest by: {', '.join(IMPORTANCES)} (default magnitude)"
    prune.add_argument("--importance", default="magnitude", metavar="RULE", help=rules)
    prune.add_argument("--statistics", metavar="FILE", help="norms of inputs for wanda and ria: nm.calibrate(...).save(FILE)")
    globs: Any = {"nargs": "+", "default": [], "metavar": "GLOB"}
    prune.add_argument("--include", help="prune these too, although their names say dense: 'lm_head.weight'", **globs)
    prune.add_argument("--exclude", help="keep these dense: '*.o_proj.*'", **globs)
    prune.add_argument("--permute", action="store_true", help="first reorder coupled channels so that masks keep more")
    budget = "time limit of that search (default: a fixed amount of work, seconds)"
    prune.add_argument("--budget", type=float, metavar="SECONDS", help=budget)
    prune.add_argument("--seed", type=int, default=0, metavar="N", help="seed of that search (default 0)")
    prune.set_defaults(command=_prune)


def _prune(options: argparse.Namespace) -> int:
    from nm_compiler.streaming.prune import prune_checkpoint

    def progress(shard: str, tensor: str, _: int) -> None:
        print(f"\r\033[K{shard}: {tensor}"[:120], end="", file=sys.stderr, flush=True)

    try:
        found = prune_checkpoint(
            options.checkpoint, options.out, pattern=_patterns(options.pattern), importance=options.importance,
            statistics=options.statistics, include=options.include, exclude=options.exclude,
            permute=options.permute, seed=options.seed, budget_s=options.budget,
            progress=progress if sys.stderr.isatty() else None,
        )  # fmt: skip
    finally:
        print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr)
    print(found)
    return 0


# -- report ------------------------------------------------------------------------------------------------------------------


_REPORT = """Lower a frozen model and say of every weight what runs it, how fast, or why it is dense. MODULE:FACTORY names a
function without arguments that returns the model with its weights loaded, or the model itself; it is imported from the working
directory or the environment."""

_INPUTS = "the shape of each positional input: 1x3x224x224 for floats, 1x128:int64 for another dtype"


def _add_report(report: argparse.ArgumentParser) -> None:
    from nm_compiler.runtime.backends.choosing import NAMES

    report.add_argument("model", metavar="MODULE:FACTORY", help="where the model comes from")
    report.add_argument("--inputs", nargs="+", metavar="SHAPE", required=True, help=_INPUTS)
    report.add_argument(
        "--backend", default="auto", choices=[name for name in NAMES if name != "onnx"], help="default %(default)s"
    )
    _add_pattern(report)
    cast = "lower a copy that is cast to this (default: as it is)"
    report.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help=cast)
    report.add_argument("--html", type=Path, metavar="FILE", help="also write the report as a page")
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    import torch

    from nm_compiler.factories import example_inputs, model_of
    from nm_compiler.files import check_place, write
    from nm_compiler.lowering import lower
    from nm_compiler.reporting import report

    if options.html:
        check_place(options.html, "--html")
    model = model_of(options.model)
    inputs = example_inputs(options.inputs, model)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    found = report(lower(model, inputs, backend=options.backend, pattern=_patterns(options.pattern), dtype=dtype))
    print(found)
    if options.html:
        write(options.html, found.to_page(), "--html")
        print(f"The report is also in {options.html}")
    return 0


# -- --pattern, which three of them take -------------------------------------------------------------------------------------


def _add_pattern(command: argparse.ArgumentParser) -> None:
    told = (
        "at most N non-zeros of every M (default 2:4); give it again for other weights: --pattern 'layer4.*=1:4' --pattern 2:4"
    )
    command.add_argument("--pattern", action="append", metavar="[GLOB=]N:M", help=told)


def _patterns(given: Sequence[str] | None) -> dict[str, str]:
    """What ``--pattern`` says, given once or several times: globs to patterns, the one for all other weights last."""
    from nm_compiler.errors import NMError

    found: dict[str, str] = {}
    for word in given or ["2:4"]:
        glob, _, pattern = word.rpartition("=")
        if found.setdefault(glob or "*", pattern) != pattern:
            raise NMError(
                f"--pattern {word}: another --pattern gives {glob or 'all weights'} {found[glob or '*']}, leave one out"
            )
    if "*" in found:
        found["*"] = found.pop("*")
    return found


if __name__ == "__main__":  # python -m nm_compiler.cli would do nothing, and a script would take that for success
    raise SystemExit(main())
