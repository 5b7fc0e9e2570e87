"""Let folded weights that are not computed yet (`nm_compiler.scaled`) through the exporter, to be computed when written.

program.state_dict   Scaled --plain--> stand-ins, which the exporter holds and does not read
model                stand-ins --compute_later--> tensors that are computed when somebody asks for their bytes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.export import ExportedProgram

from nm_compiler.scaled import Scaled


@contextlib.contextmanager
def plain(program: ExportedProgram) -> Iterator[None]:
    """Inside, the program's `Scaled` weights are their stand-ins."""
    scaled = _scaled(program)
    try:
        program.state_dict.update({name: value.stand_in(read=False) for name, value in scaled.items()})
        yield
    finally:
        program.state_dict.update(scaled)


def compute_later(model: Any, program: ExportedProgram) -> None:
    """Put the values of the program's `Scaled` weights in the place of their stand-ins in an `onnx_ir.Model`."""
    import onnx_ir as ir

    for name, value in _scaled(program).items():
        constant = model.graph.initializers[name]
        held = constant.const_value  # of a class of torch's, which knows dtypes that numpy does not
        constant.const_value = ir.LazyTensor(_Made(type(held), value, name), held.dtype, held.shape, name=name)


class _Made:
    """The tensor of an `onnx_ir.LazyTensor`."""

    def __init__(self, kind: Any, scaled: Scaled, name: str) -> None:
        self._kind, self._scaled, self._name = kind, scaled, name

    def __call__(self) -> Any:
        return self._kind(self._scaled.value(), name=self._name)


def _scaled(program: ExportedProgram) -> dict[str, Scaled]:
    return {name: value for name, value in program.state_dict.items() if isinstance(value, Scaled)}
