"""Whether TensorRT may use a sparse kernel for a product, by the rules that NVIDIA has published; it decides by measuring.

Rules: 2:4 along the input channels, in float16, bfloat16 or 8 bits; no conv groups; output channels a multiple of 8 and input
channels of 16. Below 256 channels sparse kernels exist but seldom win. Ref: TensorRT, "Structured Sparsity"; NVIDIA apex, ASP.
"""

from __future__ import annotations

import torch

from nm_compiler.runtime.products import Product
from nm_compiler.wording import dtype_name

_HALF = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
_LARGE = 256


def reasons(product: Product) -> tuple[tuple[str, ...], str]:
    """(why not, the one change that would help); no reasons where it may."""
    site, (out, inner) = product.site, product.site.shape[:2]
    if (site.pattern.n, site.pattern.m) != (2, 4):
        return (f"{site.pattern}: sparse tensor cores multiply 2:4",), "train with pattern='2:4'"
    if site.conv_groups > 1:
        return (f"{site.conv_groups} conv groups: TensorRT has no sparse kernel for grouped convolutions",), ""
    if product.dtype not in _HALF:
        name = dtype_name(product.dtype)
        return (f"{name}: sparse kernels exist for float16, bfloat16 and 8 bits",), "cast: nm.lower(..., dtype=torch.float16)"
    if out % 8 or inner % 16:
        padded = f"{-(-out // 8) * 8} x {-(-inner // 16) * 16}"
        return (
            f"{out} x {inner} channels: output channels must be a multiple of 8, input channels of 16",
        ), f"pad to {padded}"
    return (), "" if min(out, inner) >= _LARGE else f"below {_LARGE} channels sparse kernels seldom win"
