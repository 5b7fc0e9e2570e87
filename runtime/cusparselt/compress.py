"""Pack a masked weight in every step: by a kernel of ours, `pack_triton`, where it writes what the library would.

The layout of a packed weight is the library's own, of its version and of the architecture, and nobody promises it. So a device
is asked once: a random weight is packed both ways, and unless all bytes agree the library packs everything there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nm_compiler.runtime.cusparselt.layout import STEP
from nm_compiler.solvers.masks import masked, on_gpu

_TRIED = 2 * STEP, 3 * STEP  # several tiles in both directions
_agrees: dict[torch.device, bool] = {}


def compress(weight: Tensor) -> Tensor:
    """weight: ``[out, in]``, float16 or bfloat16, 2:4 along `in`, which is not checked. Returns the packed tensor."""
    weight = weight.detach().contiguous()
    if writes_as_library(weight):
        packed: Tensor = _kernels().packed(weight)
        return packed
    return torch._cslt_compress(weight)


def writes_as_library(weight: Tensor) -> bool:
    """Whether our kernels pack this weight as the library would; the first call on a device waits for it.

    While a CUDA graph is captured nothing can be tried: call the op once before.
    """
    if not on_gpu(weight) or weight.element_size() != 2 or any(size % STEP or not size for size in weight.shape):
        return False
    if weight.device not in _agrees and not _capturing():
        with torch.cuda.device_of(weight):
            _agrees[weight.device] = _try(weight.device)
    return _agrees.get(weight.device, False)


def _try(device: torch.device) -> bool:
    values = torch.randn(_TRIED, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = masked(values, pattern="2:4").to(device)
    ours, theirs = _kernels().packed(weight), torch._cslt_compress(weight)
    return ours.shape == theirs.shape and torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _kernels() -> Any:
    import nm_compiler.runtime.cusparselt.pack_triton as kernels

    return kernels
