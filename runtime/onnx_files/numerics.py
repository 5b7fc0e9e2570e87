"""Run an ONNX file with onnxruntime on the CPU and compare it with the program it was written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from nm_compiler.errors import NMError
from nm_compiler.runtime.onnx_files.parts import PartError, run_in_parts
from nm_compiler.runtime.onnx_files.reading import load
from nm_compiler.runtime.onnx_files.wide import Wide
from nm_compiler.wording import first_line

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class Numerics:
    """What was compared. error: the largest difference, relative to the largest value of its output, or None.

    batches: the sizes of axis 0 that were run; reason: why nothing was compared, where nothing was.
    """

    error: float | None
    tolerance: float
    batches: tuple[int, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.error is None:
            return f"not compared: {self.reason}"
        sizes = " and ".join(map(str, self.batches))
        return f"onnxruntime on CPU differs by {self.error:.1e} relative (at most {self.tolerance:.0e}), batch {sizes}"


def compare(program: ExportedProgram, inputs: tuple[Tensor, ...], outline: Path, tolerance: float | None = None) -> Numerics:
    """Compare a file with ``program`` on ``inputs``, and on a larger batch where the program leaves it free.

    outline: of the file, its large weights as external data. It is run part by part: `nm_compiler.runtime.onnx_files.parts`.
    tolerance: None is 1e-5 for float32, 5e-3 where any weight or input is float16.
    Raises NMError if an output differs by more, or is NaN where the program's is not. What onnxruntime has no CPU kernel
    for (bfloat16, as of 1.32) is not compared, and the result says so.
    """
    import onnxruntime

    dtype = precision(program, inputs)
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    options = onnxruntime.SessionOptions()
    # The graph as the file has it; and onnxruntime 1.32 dies of its NCHWc layout on some float16 models.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # what is not needed any more goes back at once
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights, for speed
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what matters comes back as an exception
    unable = onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented
    names = _names(outline, inputs)
    strange = any(tensor.dtype == torch.bfloat16 for tensor in inputs)
    runs = [] if strange else [inputs, *_larger(program, inputs)]
    feeds = [{n: tensor.detach().cpu().contiguous().numpy() for n, tensor in zip(names, run, strict=True)} for run in runs]
    try:
        found = run_in_parts(outline, feeds, options)
    except PartError as error:
        shapes = _shapes(runs[error.args[0]])
        raise NMError(
            f"onnxruntime cannot run what was exported on inputs of {shapes}: {_brief(error.__cause__ or error)}"
        ) from error
    except unable as error:
        return Numerics(None, allowed, reason=f"onnxruntime {onnxruntime.__version__} on CPU: {_brief(error)}")
    except Exception as error:
        raise NMError(f"onnxruntime {onnxruntime.__version__} does not load what was exported: {_brief(error)}") from error
    if strange:
        return Numerics(None, allowed, reason="numpy, through which onnxruntime is fed, has no bfloat16")
    pairs = zip(runs, found, strict=True)
    worst = max((_worst(program, values, list(outputs.values()), allowed, dtype) for values, outputs in pairs), default=0.0)
    return Numerics(worst, allowed, tuple(next((len(t) for t in values if t.ndim), 1) for values in runs))


def precision(program: ExportedProgram, inputs: Sequence[Tensor]) -> torch.dtype:
    """The coarsest floating dtype among weights and inputs."""
    values = [*program.state_dict.values(), *program.constants.values(), *inputs]
    found = {value.dtype for value in values if isinstance(value, Tensor) and value.dtype in TOLERANCES}
    return max(found, key=lambda dtype: TOLERANCES[dtype], default=torch.float32)


def placeholders(program: ExportedProgram) -> list[Tensor]:
    """The fake tensors of the user's inputs, whose shapes say what is dynamic."""
    wanted = set(program.graph_signature.user_inputs)
    return [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]


def _larger(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The inputs with a larger batch, in a list; empty where the batch is fixed, bounded or also another axis.

    One more, which takes the least memory; twice as many where the program ties sizes to one another, as 2 * b.
    """
    fakes = placeholders(program)
    first: list[Any] = [fake.shape[0] for fake in fakes if fake.ndim and isinstance(fake.shape[0], SymInt)]
    rest: list[Any] = [size for fake in fakes for size in fake.shape[1:] if isinstance(size, SymInt)]
    symbols = {symbol for size in first for symbol in size.node.expr.free_symbols}
    if not first or symbols & {symbol for size in rest for symbol in size.node.expr.free_symbols}:
        return []
    added = slice(1) if all(size.node.expr.is_symbol for size in first) else slice(None)
    pairs = zip(fakes, inputs, strict=True)
    more = tuple(torch.cat([t, t[added]]) if fake.ndim and isinstance(fake.shape[0], SymInt) else t for fake, t in pairs)
    largest = max(t.shape[0] for t in more if t.ndim)
    if any(program.range_constraints[symbol].upper < largest for symbol in symbols if symbol in program.range_constraints):
        return []
    return [more]


def _names(outline: Path, inputs: tuple[Tensor, ...]) -> list[str]:
    """What the file calls its inputs."""
    graph = load(outline).graph
    weights = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in weights]
    if len(names) != len(inputs):
        raise NMError(f"the file takes {len(names)} inputs ({', '.join(names)}), the program {len(inputs)}: export again")
    return names


def _worst(
    program: ExportedProgram, inputs: tuple[Tensor, ...], found: list[Any], allowed: float, dtype: torch.dtype
) -> float:
    """The largest difference of the outputs ``found`` from the program's. Raises NMError if it is more than ``allowed``."""
    with torch.no_grad():
        copies = [value.clone() for value in inputs]  # both runs share what has no batch, which a program may write to
        outputs = pytree.tree_leaves(Wide(program.module(check_guards=False)).run(*copies))
    expected = [value.detach().cpu() for value in outputs if isinstance(value, Tensor)]
    if len(found) != len(expected):
        raise NMError(f"the file gives {len(found)} outputs, the program {len(expected)} tensors: export again")
    errors = [_difference(torch.as_tensor(a), b) for a, b in zip(found, expected, strict=True)]
    worst = max(range(len(errors)), key=lambda i: errors[i], default=None)
    if worst is not None and not errors[worst] <= allowed:
        raise NMError(
            f"output {worst} of shape {list(expected[worst].shape)} differs by {errors[worst]:.1e} relative from the "
            f"program's, more than {allowed:.0e} ({dtype}), on inputs of {_shapes(inputs)}. Compare in float32, give an "
            "example in which every token attends to some token (runtimes differ on padding that sees nothing), or allow "
            "more with tolerance="
        )
    return 0.0 if worst is None else errors[worst]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of finite values over the largest of them; infinite if other entries are finite, or shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = found.double(), expected.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)):
        return float("inf")
    if not finite.any():
        return float("inf")  # nothing was compared
    scale = float(b[finite].abs().max())
    return float((a[finite] - b[finite]).abs().max()) / (scale or 1.0)


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in inputs)


def _brief(error: BaseException) -> str:
    """The message without onnxruntime's code in front of it."""
    return first_line(error).rpartition(" : ")[2][:300]
