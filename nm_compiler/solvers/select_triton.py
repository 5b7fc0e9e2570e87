"""A weight under a mask, and SR-STE's gradient, on a GPU in one pass over memory: for `nm_compiler.solvers.gpu`.

Importing this module needs triton. All tensors of a call lie alike, without gaps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nm_compiler.solvers.floats_triton import is_brain, rounded, storable, wide

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _keep(values, mask, out, total, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """values, out: bits as whole numbers; mask: bytes."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < total
    kept = tl.load(mask + place, mask=there, other=0) != 0
    tl.store(out + place, tl.where(kept, tl.load(values + place, mask=there, other=0), 0), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pull(grad, weight, masked, out, total, decay: tl.constexpr, block: tl.constexpr, brain: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """``(weight - masked) * decay + grad``, rounded three times."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = place < total
    dtype: tl.constexpr = out.dtype.element_ty
    own = wide(tl.load(weight + place, mask=there, other=0), brain)
    kept = wide(tl.load(masked + place, mask=there, other=0), brain)
    given = wide(tl.load(grad + place, mask=there, other=0), brain)
    pruned = wide(rounded(own - kept, dtype, brain), brain)
    pulled = wide(rounded(pruned * tl.full([block], decay, pruned.dtype), dtype, brain), brain)
    tl.store(out + place, rounded(pulled + given, dtype, brain), mask=there)


def keep(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write ``values where mask else 0``, to the bit. values, out: of 2, 4 or 8 bytes a number; mask: bool."""
    whole, total = _WHOLE[values.element_size()], values.numel()
    _keep[(-(-total // _BLOCK),)](values.view(whole), mask.view(torch.uint8), out.view(whole), total, block=_BLOCK)


def decay(grad: Tensor, weight: Tensor, masked: Tensor, amount: float, out: Tensor) -> None:
    """Write ``(weight - masked) * amount + grad``, rounded as torch's three operations round it; all of one floating dtype.

    amount: compiled in, since a number that a kernel is given has 32 bits. Product and sum are not fused.
    """
    total = weight.numel()
    tensors = (storable(tensor) for tensor in (grad, weight, masked, out))
    _pull[(-(-total // _BLOCK),)](*tensors, total, decay=amount, block=_BLOCK, brain=is_brain(weight), enable_fp_fusion=False)
