"""What one order is judged by: the weights that a class of coupled channels runs through, and what N:M keeps of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.pattern import Pattern
from nm_compiler.solvers.magnitude import magnitude_mask

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1 << 22  # numbers in flight


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One weight that an order of channels permutes, as an importance that is not negative.

    kind: ``"input"``, the channels lie along the last axis of ``values [.., axis]`` (rows may be out x taps), N:M groups
    along it are counted; ``"output"``, they lie along the first axis of ``values [axis, .., in]``, and after the forward
    mask (N:M along the last axis) the backward groups along the first axis are counted, as Bi-Mask does.
    weight: how much this member counts beside the others.

    The class may be a part of its axis: from ``start`` on, the axis reads ``[outer, size, inner]`` and an order moves the
    middle one (the same for all heads: outer = heads; whole heads: inner = width of a head). Groups are runs of M along
    the whole axis. ``size`` may be left out where the class fills the axis from ``start`` on.
    """

    values: ArrayLike | Tensor
    kind: Literal["input", "output"] = "input"
    weight: float = 1.0
    size: int | None = None
    outer: int = 1
    inner: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("input", "output"):
            raise NMError(f"Member(kind={self.kind!r}): choose 'input' or 'output'")
        if not (isinstance(self.weight, (int, float)) and 0 <= self.weight < math.inf):
            raise NMError(f"Member(weight={self.weight!r}): a finite number >= 0")
        if min(self.outer, self.inner, self.start + 1) < 1 or (self.size is not None and self.size < 0):
            given = f"size={self.size}, outer={self.outer}, inner={self.inner}, start={self.start}"
            raise NMError(f"Member({given}): whole numbers, outer and inner >= 1, size and start >= 0")
        if len(self.shape) < 2:
            raise NMError(f"importance of shape {list(self.shape)}: needs a matrix [rows, channels]")
        if self.channels * self.outer * self.inner + self.start > self.axis:
            given = f"start={self.start} + outer={self.outer} x size={self.channels} x inner={self.inner}"
            raise NMError(f"Member: {given} reaches beyond the axis of {self.axis} (values {list(self.shape)})")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return tuple(self.values.shape) if isinstance(self.values, (np.ndarray, Tensor)) else np.shape(self.values)

    @property
    def axis(self) -> int:
        """Length of the axis in which the class lies."""
        return self.shape[-1 if self.kind == "input" else 0]

    @property
    def channels(self) -> int:
        """How many channels the class has."""
        return (self.axis - self.start) // (self.outer * self.inner) if self.size is None else self.size

    @property
    def rows(self) -> int:
        """How many rows it adds to the matrix that is searched."""
        return self.outer * (math.prod(self.shape) // max(1, self.axis))

    def is_aligned(self, m: int) -> bool:
        """Whether every group of the class holds whole channels of one run, so that a search can weigh single swaps."""
        return self.inner == 1 and self.start % m == 0 and self.channels % m == 0

    def is_indifferent(self, m: int) -> bool:
        """Whether no order changes what is kept: groups lie inside the blocks that move."""
        return self.weight == 0 or (self.inner % m == 0 and self.start % m == 0)


def as_members(importance: ArrayLike | Tensor | Member | Sequence[Member], pattern: Pattern) -> tuple[Member, ...]:
    """One matrix, one member or several, checked against each other. Raises NMError."""
    if isinstance(importance, Member):
        members: tuple[Member, ...] = (importance,)
    elif isinstance(importance, (list, tuple)) and importance and all(isinstance(each, Member) for each in importance):
        members = tuple(importance)
    else:
        matrix = importance if isinstance(importance, Tensor) else np.asarray(importance)
        if matrix.ndim != 2:
            raise NMError(f"importance of shape {list(matrix.shape)}: needs a matrix [rows, channels]")
        members = (Member(matrix),)
    sizes = {member.channels for member in members}
    if len(sizes) > 1:
        raise NMError(f"members of one class have {sorted(sizes)} channels: one order cannot permute them all")
    for member in members:
        if member.axis % pattern.m:
            raise NMError(f"{member.axis} channels (values {list(member.shape)}) do not divide into groups of {pattern.m}")
        if member.kind == "output" and member.shape[-1] % pattern.m:
            raise NMError(f"an output member of shape {list(member.shape)}: {pattern.m} does not divide its last axis")
    return members


def checked(member: Member) -> Tensor:
    """The values on the CPU, float32 or float64. Raises NMError unless they are finite and not negative."""
    if isinstance(member.values, Tensor):
        tensor = member.values.detach().cpu()
    else:
        array = np.asarray(member.values)
        if array.dtype.kind not in "fiub":
            raise NMError(f"importance of dtype {array.dtype}: needs real numbers")
        array = array if array.dtype == np.float32 else array.astype(np.float64)
        tensor = torch.from_numpy(array if array.flags.writeable and min(array.strides, default=1) > 0 else array.copy())
    if tensor.is_complex():
        raise NMError(f"importance of dtype {tensor.dtype}: needs real numbers")
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) else tensor.double()
    if tensor.numel():
        low, high = (float(end) for end in tensor.aminmax())
        if not (low >= 0 and high < math.inf):
            kind = "NaN" if math.isnan(low) else "infinite" if math.isinf(low) or math.isinf(high) else "negative"
            hint = ": pass magnitudes, such as weight.abs()" if kind == "negative" else ""
            raise NMError(f"importance of shape {list(member.shape)} has {kind} entries{hint}")
    return tensor


def blocks(member: Member, values: Tensor, pattern: Pattern) -> Iterator[Array]:
    """The `checked` values of a member piece by piece as ``[rows, axis]``, forward mask applied, weight not."""
    if not values.numel():
        return
    if member.kind == "input":
        flat = values.reshape(-1, values.shape[-1])
        for part in flat.split(max(1, _CHUNK // flat.shape[1])):
            yield part.numpy()
    else:  # cut in whole forward groups
        flat = values.reshape(values.shape[0], -1)
        step = max(1, _CHUNK // (flat.shape[0] * pattern.m)) * pattern.m
        for part in flat.split(step, dim=1):
            yield torch.where(magnitude_mask(part, pattern.n, pattern.m, 1), part, part.new_zeros(())).T.numpy()


def retained(
    importance: ArrayLike | Tensor | Member | Sequence[Member],
    order: ArrayLike | Tensor | None = None,
    *,
    pattern: str | tuple[int, int] | Pattern,
) -> float:
    """What N:M keeps when the channels are taken in ``order`` (``new[i] = old[order[i]]``), summed over all members.

    The reference of every search, in float64 and without shortcuts. order: int64 ``[channels]``, default the identity.
    Raises NMError for members that do not fit each other, the pattern or the order.
    """
    nm = Pattern.parse(pattern)
    members = as_members(importance, nm)
    given = check_order(order, members[0].channels)
    return math.fsum(member.weight * _kept(member, given, nm) for member in members)


def _kept(member: Member, order: Array, pattern: Pattern) -> float:
    place = np.arange(member.axis)
    used = member.outer * member.channels * member.inner
    part = place[member.start : member.start + used].reshape(member.outer, member.channels, member.inner)
    place[member.start : member.start + used] = part[:, order].reshape(-1)
    least = pattern.m - pattern.n
    total = 0.0
    for block in blocks(member, checked(member), pattern):
        groups = block[:, place].reshape(len(block), -1, pattern.m)
        total += float(np.partition(groups, least, axis=-1)[..., least:].sum(dtype=np.float64))
    return total


def efficacy(
    importance: ArrayLike | Tensor | Member | Sequence[Member],
    order: ArrayLike | Tensor,
    *,
    pattern: str | tuple[int, int] | Pattern,
) -> float:
    """Share of the gap between the unpermuted N:M and the row-wise best N/M that ``order`` closes; 0 where there is none.

    Ref: Pool & Yu, *Channel Permutations for N:M Sparsity*, NeurIPS 2021.
    """
    nm = Pattern.parse(pattern)
    members = as_members(importance, nm)
    before = retained(members, pattern=nm)
    bound = math.fsum(member.weight * _row_bound(member, nm) for member in members)
    gap = bound - before
    return (retained(members, order, pattern=nm) - before) / gap if gap > 1e-12 * bound else 0.0


def _row_bound(member: Member, pattern: Pattern) -> float:
    least = member.axis - member.axis // pattern.m * pattern.n
    total = 0.0
    for block in blocks(member, checked(member), pattern):
        total += float(np.partition(block, least, axis=1)[:, least:].sum(dtype=np.float64))
    return total


def check_order(order: ArrayLike | Tensor | None, channels: int) -> Array:
    """An order as int64 ``[channels]``; None is the identity. Raises NMError unless it is a permutation."""
    if order is None:
        return np.arange(channels)
    given = np.asarray(order.detach().cpu() if isinstance(order, Tensor) else order)
    if given.shape != (channels,) or (channels and given.dtype.kind not in "iu"):
        raise NMError(f"an order of {channels} channels is {channels} whole numbers, not {given.dtype} {list(given.shape)}")
    if not np.array_equal(np.sort(given), np.arange(channels)):
        raise NMError(f"the order is not a permutation of 0 .. {channels - 1}")
    return given.astype(np.int64)
