"""Arithmetic of numpy in a model's Python, such as ``np.array(x.shape) % 32``, while TorchDynamo traces it under a watch.

    size % 32      ──TorchDynamo──►      watch(Tensor.remainder, size, 32)      ──here──►      size % 32
    32 - size                            watch(Tensor.__rsub__, size, 32)                      32 - size

Under any torch function mode TorchDynamo takes an operator on an array for the method of a tensor, which no array has, and
says that the model fails. Without a mode it traces the operator itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

OPERATORS: dict[str, Callable[..., Any]] = {
    "abs": operator.abs, "neg": operator.neg, "positive": operator.pos, "__invert__": operator.invert,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
    "__floordiv__": operator.floordiv, "remainder": operator.mod, "matmul": operator.matmul,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "__eq__": operator.eq, "ne": operator.ne,
    "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor,
    "bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_xor": operator.xor,
    "__lshift__": operator.lshift, "__rshift__": operator.rshift,
    "add_": operator.iadd, "sub_": operator.isub, "mul_": operator.imul, "div_": operator.itruediv, "pow_": operator.ipow,
    "floor_divide_": operator.ifloordiv, "remainder_": operator.imod,
    "__iand__": operator.iand, "__ior__": operator.ior, "__ixor__": operator.ixor,
    "__ilshift__": operator.ilshift, "__irshift__": operator.irshift,
}  # fmt: skip
"""What a method of a tensor stands for, by its name."""

TURNED: dict[str, Callable[..., Any]] = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod, "__rpow__": operator.pow, "__rlshift__": operator.lshift, "__rrshift__": operator.rshift,
}  # fmt: skip
"""The same of those whose operands stand the other way round."""
