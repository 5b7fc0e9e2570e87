"""Why a product of an N:M weight stays dense under cuSPARSELt: all reasons, a sentence each, with the way out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from nm_compiler.pattern import Pattern
from nm_compiler.runtime.cusparselt.unfold import Geometry
from nm_compiler.wording import dtype_name

MIN_TOKENS = 1024
"""The fewest tokens at which every measured shape was faster packed (H200, bf16, CUDA graphs); at 256 half were not."""


@dataclass(frozen=True, slots=True)
class Product:
    """What is known of one product: its op, the weight it reads, and for convolutions their geometry.

    op: linear, conv2d, or another that is not lowered. shape: ``[out, in]`` or ``[out, in / groups, *taps]``.
    tokens: rows of the flattened output, batch times positions, or None if unknown.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pattern: Pattern
    tokens: int | None = None
    geometry: Geometry | None = None
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of the device: its type, compute capability, and the version of cuSPARSELt in this torch.

    None where there is none.
    """

    kind: str
    capability: tuple[int, int] | None = None
    library: int | None = None


def int8_reasons(product: Product) -> tuple[str, ...]:
    """Why a product that can be packed in 16 bits cannot be packed in 8."""
    if product.op != "linear":
        return (f"{product.op} stays in 16 bits: only linears are packed in int8",)
    return tuple(of_sizes(product.shape, torch.int8))


def machine_of(device: torch.device) -> Machine:
    """Ask torch about a device; a CUDA device that is not there comes back without a capability."""
    if device.type != "cuda" or torch.version.hip:  # AMD devices call themselves cuda as well
        return Machine("rocm" if device.type == "cuda" else device.type)
    library = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return Machine("cuda", torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None, library)


def reasons(product: Product, machine: Machine, *, min_tokens: int = MIN_TOKENS, unfold: bool = False) -> tuple[str, ...]:
    """Every reason why ``product`` stays dense on ``machine``, those of the product first; none if it can be packed.

    unfold: whether convolutions may become matrix products by a copy of their input.
    """
    return tuple(chain(of_product(product, unfold=unfold), of_tokens(product.tokens, min_tokens), of_machine(machine)))


def of_product(product: Product, *, unfold: bool = False) -> Iterable[str]:
    """What no other device and no more tokens would change."""
    yield from of_op(product.op)
    yield from of_pattern(product.pattern)
    yield from of_dtype(product.dtype)
    if product.op in ("linear", "conv2d"):
        if product.geometry is not None and not unfold:
            yield from of_geometry(product.geometry)
        yield from of_groups(product.groups)
        yield from of_sizes(product.shape, product.dtype)


def of_op(op: str) -> Iterable[str]:
    """Only two ops are lowered."""
    if op not in ("linear", "conv2d"):
        yield f"{op} is not lowered, only linears and 2-D convolutions are: write it as torch.nn.functional.linear"


def of_pattern(pattern: Pattern) -> Iterable[str]:
    """The hardware has 2:4, and what is stricter, such as 1:4 or 2:8, is 2:4 too."""
    if not within_2_of_4(pattern):
        yield f"{pattern} can keep more than 2 of 4 neighbours, and sparse tensor cores have 2:4 only: use pattern='2:4'"


def of_dtype(dtype: torch.dtype) -> Iterable[str]:
    """Weights have 16 bits and no scales."""
    name = dtype_name(dtype)
    if dtype in (torch.int8, torch.float8_e4m3fn):
        yield f"{name} without its scales: leave the weight in float16 or bfloat16, options={{'int8': ['*']}} rounds it"
    elif dtype not in (torch.float16, torch.bfloat16):
        yield f"no sparse product is built for {name}: cast the model to float16 or bfloat16"


def of_geometry(geometry: Geometry) -> Iterable[str]:
    """cuSPARSELt multiplies matrices: a convolution has to be one, or becomes one by a copy that seldom pays."""
    way = "this is done only where it is measured (choose=True), and TensorRT needs no copy (backend='tensorrt')"
    taps, stride = ("x".join(map(str, sizes)) for sizes in (geometry.taps, geometry.stride))
    if geometry.taps != (1, 1):
        yield f"{taps} taps, a matrix product only by a copy of {math.prod(geometry.taps)} times the input: {way}"
    elif geometry.stride != (1, 1):
        yield f"stride {stride}, a matrix product only by a copy of the input: {way}"
    elif not geometry.plain:
        yield f"a padded 1x1 convolution, a matrix product only by a copy of the input: {way}"


def of_groups(groups: int) -> Iterable[str]:
    """A grouped convolution is several small products."""
    if groups != 1:
        yield f"{groups} conv groups are as many small products, for which nothing has sparse kernels: use groups=1"


def of_sizes(shape: Sequence[int], dtype: torch.dtype) -> Iterable[str]:
    """Both sizes of the matrix come in whole tiles."""
    step = multiple_of(dtype)
    for size, what in zip(shape[:2], ("output", "input"), strict=True):
        if size % step:
            yield f"{size} {what} channels are no multiple of {step}: make them {-(-size // step) * step}"


def of_tokens(tokens: int | None, least: int) -> Iterable[str]:
    """Small products are slower packed."""
    if tokens is not None and tokens < least:
        yield f"{tokens} tokens, and packed products tend to be slower below {least}: use a larger batch, or lower min_tokens"


def of_machine(machine: Machine) -> Iterable[str]:
    """A GPU from Ampere on, and a torch that was built with the library."""
    if machine.kind != "cuda":
        yield f"the weight is on {machine.kind}: move the model to an NVIDIA GPU first"
        return
    if machine.capability is None:
        yield "torch finds no NVIDIA GPU: work on the machine that runs the model"
    elif machine.capability < (8, 0):
        found = ".".join(map(str, machine.capability))
        yield f"compute capability {found} has no sparse tensor cores: they came with 8.0 (Ampere)"
    if machine.library is None:
        yield "this torch was built without cuSPARSELt: install one of the CUDA wheels of pytorch.org"


def multiple_of(dtype: torch.dtype) -> int:
    """What rows and columns of a weight have to be multiples of. Ref: torch.sparse, shape constraints of cuSPARSELt."""
    return 32 if dtype.itemsize == 1 else 16


def within_2_of_4(pattern: Pattern) -> bool:
    """Whether whatever ``pattern`` keeps is 2:4 as well.

    >>> [str(p) for p in map(Pattern.parse, ("2:4", "1:4", "1:2", "2:8", "4:8", "3:4")) if within_2_of_4(p)]
    ['2:4', '1:4', '1:2', '2:8']
    """
    for first in range(0, math.lcm(pattern.m, 4), 4):
        groups = range(first // pattern.m, (first + 3) // pattern.m + 1)
        shared = (min(first + 4, (group + 1) * pattern.m) - max(first, group * pattern.m) for group in groups)
        if sum(min(pattern.n, count) for count in shared) > 2:
            return False
    return True
