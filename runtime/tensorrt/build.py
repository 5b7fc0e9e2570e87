"""Build TensorRT engines of a frozen program, through `torch_tensorrt.dynamo.compile`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nm_compiler.runtime.tensorrt.log import LOGGER, SparsityLog, listening, parse
from nm_compiler.runtime.tensorrt.options import merged
from nm_compiler.runtime.tensorrt.profiles import Batch, check_bounded, in_program_order, specified, with_profile
from nm_compiler.runtime.tensorrt.versions import import_torch_tensorrt


@dataclass(frozen=True, slots=True)
class Built:
    """module: takes the program's inputs, runs its engines. log: what TensorRT said of the zeros.

    inputs, kwargs: what the engines were built for, as `files.save` wants them.
    """

    module: nn.Module
    log: SparsityLog
    inputs: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def build(
    program: ExportedProgram,
    inputs: Sequence[Tensor],
    *,
    kwargs: Mapping[str, Any] | None = None,
    batch: Batch | None = None,
    options: Mapping[str, Any] | None = None,
) -> Built:
    """Compile ``program``, whose weights are frozen N:M constants, with sparse kernels allowed.

    inputs, kwargs: examples of the program's inputs, on the GPU, in the program's dtype.
    batch: ``(smallest, usual, largest)`` for a program with a dynamic batch. Without it the program's own bounds count.
    options: further keywords of `torch_tensorrt.dynamo.compile`, for instance those of its engine cache
    (``cache_built_engines``, ``reuse_cached_engines``, ``engine_cache_dir``), ``device`` or ``optimization_level``.

    Nothing is cast here: TensorRT has sparse kernels for float16, bfloat16 and 8-bit weights only, so a program in float32
    ends up dense, with a logged warning.
    Raises NMError if torch_tensorrt or TensorRT is missing or does not fit torch, for an option that would undo sparsity or
    does not exist, for inputs that are not the program's, and for a batch without bounds.
    """
    torch_tensorrt = import_torch_tensorrt()
    settings = merged(options or {}, torch_tensorrt.dynamo.compile)
    examples = in_program_order(program, inputs, kwargs or {})
    if batch is None:
        check_bounded(program)
    else:
        program, examples = with_profile(program, examples, batch)
    args, keywords = specified(program, examples, torch_tensorrt)
    _warn_of_float32(program)
    with listening(LOGGER, logging.DEBUG, "(Sparsity)") as heard:
        module = torch_tensorrt.dynamo.compile(program, arg_inputs=args, kwarg_inputs=keywords, **settings)
    return Built(module, parse(record.getMessage() for record in heard), args, keywords)


def _warn_of_float32(program: ExportedProgram) -> None:
    weights = [value for value in program.state_dict.values() if value.ndim > 1 and value.is_floating_point()]
    quantized = any("quantize" in str(node.target) for node in program.graph.nodes)
    if weights and not quantized and all(weight.dtype == torch.float32 for weight in weights):
        logging.getLogger(__name__).warning(
            "all weights are float32, for which TensorRT has no sparse kernels: the engine will be dense. "
            "Cast the model to float16 or bfloat16 before it is exported"
        )
