"""Give the weights of a product the dtype of its data again.

    before                                                          after
    Conv(x bfloat16, conv.weight float32, conv.bias float32)        Conv(x bfloat16, conv.weight bfloat16, conv.bias bfloat16)

The optimiser of onnxscript 0.7 folds a batch norm in numpy, which has no bfloat16: what it folds comes out in float32.
"""

from __future__ import annotations

from typing import Any

PRODUCTS = ("Conv", "ConvTranspose", "Gemm")


def match_dtypes(model: Any) -> None:
    """Cast constants of products in an `onnx_ir.Model`, in place, where the data is of another floating dtype."""
    import onnx_ir as ir

    for node in model.graph:
        wanted = node.inputs[0].dtype if node.op_type in PRODUCTS else None
        if wanted is None or not wanted.is_floating_point():
            continue
        for value in node.inputs[1:]:
            if value is not None and value.const_value is not None and value.const_value.dtype != wanted:
                array = value.const_value.numpy().astype(wanted.numpy())
                value.const_value = ir.Tensor(array, dtype=wanted, name=value.name)
                value.dtype = wanted
