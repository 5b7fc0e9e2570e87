"""Run a float16 program on a CPU with its products in float32, each rounded to float16.

    before                                     after
    %y = aten.conv2d(%x, %w, %b) : f16         %y = aten.conv2d(%x.float(), %w.float(), %b.float()).half()

That is what onnxruntime's CPU kernels compute, and what float16 kernels with a float32 accumulator compute; few CPUs
have the latter, and without them torch takes up to twenty times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

from nm_compiler.memory import give_back
from nm_compiler.sites.equations import PRODUCTS
from nm_compiler.sites.uses import CONVS


class Wide(Interpreter):
    """`torch.fx.Interpreter` of a GraphModule that widens the operands of products of float16 on a CPU."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node: as it is, or wide."""
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        narrow = bool(tensors) and all(each.dtype == torch.float16 and each.device.type == "cpu" for each in tensors)
        if target not in CONVS and target not in PRODUCTS:
            return super().call_function(target, args, kwargs)
        if narrow:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
        result = super().call_function(target, args, kwargs)
        del args, kwargs, tensors
        give_back()
        return result.half() if narrow else result
