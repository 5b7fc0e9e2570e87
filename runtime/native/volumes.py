"""A convolution over three axes of space as products over two, of which the CPU kernels are.

    kernel [k, 1, 1]   [B, C, T, H, W]  ->  [B, C, T, H W]      a view
    kernel [1, 1, k]   [B, C, T, H, W]  ->  [B, C, T H, W]      a view
    kernel [1, k, k]   [B, C, T, H, W]  ->  [B T, C, H, W]      frames are images: laid out anew there and back; likewise
                                                                where another axis has the kernel's 1
    kernel [k, k, k]   [B, C, T, H, W]  ->  [T B, C, H, W]      frames are images, and the kernel k images of its own: the sum
                                                                of one is what the next begins with

An axis along which the kernel is 1 and nothing is padded only drops positions, by its stride, which is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_END = 2**63 - 1  # of a slice that ends with its axis
_Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Images:
    """What a product over two axes is called with besides its weight and bias, conv groups left out."""

    kernel: _Pair
    stride: _Pair
    padding: _Pair
    dilation: _Pair


@dataclass(frozen=True, slots=True)
class Volume:
    """What a convolution over three axes is called with."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def thin(self) -> set[int]:
        """Axes along which a position of the result reads one position."""
        return {axis for axis in range(3) if self.kernel[axis] == 1 and not self.padding[axis]}

    def parts(self, weight: Tensor) -> list[Tensor]:
        """The weights of the products: the weight itself, or one for each frame of its kernel."""
        return [weight] if self.thin else list(weight.unbind(2))

    def images(self, *axes: int | None) -> Images:
        """How two axes are treated. None: one of positions alone, as those of `thin` are when they have dropped some."""
        given = [(1, 1, 0, 1) if each is None or each in self.thin else self._along(each) for each in axes]
        first, second = given
        return Images(*((one, other) for one, other in zip(first, second, strict=True)))

    def _along(self, axis: int) -> tuple[int, int, int, int]:
        return self.kernel[axis], self.stride[axis], self.padding[axis], self.dilation[axis]


def through_images(
    volume: Volume, x: Any, sizes: Sequence[int | None], call: Callable[..., Any], product: Callable[..., Any]
) -> Any:
    """The convolution of ``x [B, C, T, H, W]``.

    sizes: of x, None for one that is not known; call: computes an op of its arguments, or makes a node of it, as
    ``product(part, images, how, added)`` does for the products: part: of `Volume.parts`, how: `Images`, added: what is added.
    """
    thin = volume.thin
    for axis in thin:
        if volume.stride[axis] > 1:
            x = call(aten.slice.Tensor, x, axis + 2, 0, _END, volume.stride[axis])

    def size(axis: int) -> Any:
        known = sizes[axis + 2]
        return call(aten.sym_size.int, x, axis + 2) if known is None else -(-known // volume.stride[axis])

    if {1, 2} <= thin:
        y = product(0, call(aten.flatten.using_ints, x, 3, 4), volume.images(0, None), None)
        return call(aten.unflatten.int, y, 3, [size(1), size(2)])
    if {0, 1} <= thin:
        y = product(0, call(aten.flatten.using_ints, x, 2, 3), volume.images(None, 2), None)
        return call(aten.unflatten.int, y, 2, [size(0), size(1)])
    if thin:
        axis = min(thin)
        others = [other for other in range(3) if other != axis]
        order = [0, axis + 2, 1, *(other + 2 for other in others)]
        images = call(aten.flatten.using_ints, call(aten.permute.default, x, order), 0, 1)
        y = product(0, images, volume.images(*others), None)
        y = call(aten.unflatten.int, y, 0, [-1, size(axis)])
        back = [order.index(place) for place in range(5)]
    else:
        y = _by_frames(volume, x, sizes[2], call, product)
        back = [1, 2, 0, 3, 4]
    return call(aten.contiguous.default, call(aten.permute.default, y, back))


def _by_frames(volume: Volume, x: Any, frames: int | None, call: Callable[..., Any], product: Callable[..., Any]) -> Any:
    """``[T', B, O, H', W']``: frames first, so that those which one frame of the kernel meets lie one behind the other."""
    kernel, stride, padding, dilation = volume._along(0)
    if padding:
        x = call(aten.constant_pad_nd.default, x, [0, 0, 0, 0, padding, padding])
    x = call(aten.contiguous.default, call(aten.permute.default, x, [2, 0, 1, 3, 4]))
    left, total = None, (kernel - 1) * dilation
    count: Any = None if frames is None else (frames + 2 * padding - total - 1) // stride + 1
    for part in range(kernel):
        end = part * dilation - total or _END
        met = call(aten.slice.Tensor, x, 0, part * dilation, end, stride)
        if count is None:
            count = call(aten.sym_size.int, met, 0)
        left = product(part, call(aten.flatten.using_ints, met, 0, 1), volume.images(1, 2), left)
    return call(aten.unflatten.int, left, 0, [count, -1])
