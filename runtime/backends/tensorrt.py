"""Engines of TensorRT, through Torch-TensorRT. Never executed by us beyond its partitioner: see docs/tensorrt.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from nm_compiler.errors import NMError
from nm_compiler.graph import run
from nm_compiler.passes.linear_as_conv import linear_as_conv
from nm_compiler.runtime.backends.base import Backend, Job, Result
from nm_compiler.runtime.products import Decision, Product, products
from nm_compiler.runtime.tensorrt.build import build
from nm_compiler.runtime.tensorrt.eligible import reasons
from nm_compiler.runtime.tensorrt.log import SparsityLog
from nm_compiler.runtime.tensorrt.versions import import_torch_tensorrt
from nm_compiler.wording import dtype_name


class TensorRT(Backend):
    """Options: those of `torch_tensorrt.dynamo.compile`; batch ``(smallest, usual, largest)``; linear_as_conv.

    linear_as_conv: globs of linears to compute as 1x1 convolutions.
    """

    name = "tensorrt"

    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        try:
            import_torch_tensorrt()
        except NMError as error:
            return str(error)
        if device.type != "cuda":
            return f"the model is on {device}: TensorRT runs on NVIDIA GPUs, model.cuda() and inputs on the GPU"
        if dtype not in (torch.float16, torch.bfloat16):
            name = dtype_name(dtype)
            return f"{name}: TensorRT has sparse kernels for float16 and bfloat16, say dtype=torch.float16 (or bfloat16)"
        return None

    def lower(self, job: Job) -> Result:
        options = dict(job.options)
        batch, forms = options.pop("batch", None), options.pop("linear_as_conv", ())
        gm = run(job.gm, [lambda gm: linear_as_conv(gm, include=tuple(forms))]) if forms else job.gm
        found = list(products(gm, job.sites))
        program = replace(job, gm=gm).program(dynamic=batch is not None, one_batch=True)
        built = build(program, job.tensors, batch=batch, options=options)
        decisions = {each.node: _decided(each, built.log) for each in found}
        sizes = "" if batch else "Built for inputs of the examples' sizes only; options={'batch': (1, 8, 32)} takes others."
        notes = (*_summary(built.log), *built.log.lines, *filter(None, [sizes]))
        return Result(built.module, decisions, found, notes, artifact=built, takes_tensors_only=True)


def _decided(each: Product, log: SparsityLog) -> Decision:
    why, hint = reasons(each)
    if why:
        return Decision(reasons=why, hint=hint)
    if _named(each, log.chosen):
        return Decision(kernel="TensorRT sparse", eligible=True)
    if _named(each, log.eligible):
        return Decision(reasons=("TensorRT measured a dense kernel as faster",), hint=hint or "larger batch", eligible=True)
    return Decision(reasons=("TensorRT's log does not name this layer",), hint=hint, eligible=True)


def _named(each: Product, layers: Iterable[str]) -> bool:
    """Torch-TensorRT's layer names hold the name of the node that they were made of, as a word."""
    word = re.compile(rf"(?<!\w){re.escape(each.node)}(?!\w)")
    return any(word.search(layer) for layer in layers)


def _summary(log: SparsityLog) -> tuple[str, ...]:
    counts = f"TensorRT: {log.eligible_count} layers eligible for sparse kernels, {log.chosen_count} chosen."
    return (counts,) if log.lines else ("TensorRT said nothing about sparsity: it may have built the engine from a cache.",)
