"""A file for other runtimes: TensorRT's trtexec, ONNX Runtime and what else reads ONNX."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from nm_compiler.errors import NMError
from nm_compiler.runtime.backends.base import Backend, Job, Result
from nm_compiler.runtime.onnx_files import commands, export
from nm_compiler.runtime.onnx_files.naming import output_names
from nm_compiler.runtime.onnx_files.packages import require
from nm_compiler.runtime.products import Decision, Product
from nm_compiler.runtime.tensorrt.eligible import reasons
from nm_compiler.sites.plan import Site
from nm_compiler.wording import several
from nm_compiler.written import carried


class Onnx(Backend):
    """Options: path (needed), tolerance and one_file of `nm_compiler.runtime.onnx_files.export.write`.

    The module that comes back runs the same graph in PyTorch; the file is its ``artifact``. Unless weights were cast, folded
    ones are computed when it is first called: who wants the file alone needs no memory for them.
    """

    name = "onnx"
    later = for_files = True

    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        try:
            require("onnx", "onnxscript", "onnxruntime", why="an ONNX file")
        except NMError as error:
            return str(error)
        return None

    def lower(self, job: Job) -> Result:
        options = self.take(job, "path", "tolerance", "one_file")
        if "path" not in options:
            raise NMError('backend="onnx" writes a file: options={"path": "model.onnx"}')
        state = sorted(carried(job.gm))
        if state:
            raise NMError(
                f"forward() writes to {several(state, 3)} and goes by it in its next call, and an ONNX file keeps nothing "
                "between calls: take it as an input and return it with the outputs, or lower to another backend"
            )
        found = job.products
        program, sites = job.program(tensors_out=True), _sites(found)
        decisions = {each.node: _decided(each) for each in found}
        rows = [
            {"weight": each.site.name, "op": each.site.op, "reasons": list(decisions[each.node].reasons)} for each in found
        ]
        written = export.write(
            program, job.tensors, os.fspath(options.pop("path")), sites=sites,
            outputs=output_names(job.gm, job.signature.out_spec), report={"products": rows}, **options,
        )  # fmt: skip
        held = job.signature.conditions()
        unchecked = (f"Nothing in the file checks that its branches of forward() hold: only while {' and '.join(held)}",)
        notes = (
            f"Written to {written.path}, its zeros read back from the file. {written.numerics}",
            *(unchecked if held else ()),
            "Whether a kernel is sparse is decided where the file is run. TensorRT 11:",
            "  " + commands.trtexec(written),
        )
        return Result(job.gm, decisions, found, notes, artifact=written)


def _sites(found: list[Product]) -> dict[str, Site]:
    """Constants by the name that the program knows them under; parts of one weight are told apart."""
    sites: dict[str, Site] = {}
    for each in found:
        name, used = each.site.name, {site.name for site in sites.values()}
        if each.read in sites:
            continue
        count = sum(1 for other in used if other == name or other.startswith(f"{name}["))
        sites[each.read] = each.site if name not in used else replace(each.site, name=f"{name}[{count}]")
    return sites


def _decided(each: Product) -> Decision:
    why = reasons(each)
    return Decision(reasons=why[0], hint=why[1], eligible=not why[0], kernel="" if why[0] else "N:M constant in the file")
