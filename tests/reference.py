"""The papers' formulas, transcribed to NumPy loops that share no code with the library.

A weight is [O, I, R, S]; a linear is the case R = S = 1 on a [B, I, 1, 1] input. Groups of M run along I at fixed
(o, r, s) forward, and along O at fixed (i, r, s) backward. All in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def convolve(x: Array, w: Array, bias: Array, stride: int, pad: int) -> Array:
    """y[b, o, p, q] = sum over i, r, s of x[b, i, p * stride + r - pad, ..] w[o, i, r, s], plus bias[o]."""
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    _, _, taps_r, taps_s = w.shape
    height = (padded.shape[2] - taps_r) // stride + 1
    width = (padded.shape[3] - taps_s) // stride + 1
    y = np.zeros((x.shape[0], w.shape[0], height, width))
    for r, s in itertools.product(range(taps_r), range(taps_s)):
        window = padded[:, :, r : r + stride * height : stride, s : s + stride * width : stride]
        y += np.einsum("biPQ,oi->boPQ", window, w[:, :, r, s])
    return y + bias[None, :, None, None]


def grad_input(grad: Array, w: Array, shape: tuple[int, ...], stride: int, pad: int) -> Array:
    """dL/dx for the product of `convolve` with weight w."""
    batch, channels, height, width = shape
    padded = np.zeros((batch, channels, height + 2 * pad, width + 2 * pad))
    for r, s in itertools.product(range(w.shape[2]), range(w.shape[3])):
        spread = np.einsum("boPQ,oi->biPQ", grad, w[:, :, r, s])
        padded[:, :, r : r + stride * grad.shape[2] : stride, s : s + stride * grad.shape[3] : stride] += spread
    return padded[:, :, pad : pad + height, pad : pad + width]


def grad_weight(grad: Array, x: Array, shape: tuple[int, ...], stride: int, pad: int) -> Array:
    """dL/dw of `convolve`: dense, whatever the mask."""
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    result = np.zeros(shape)
    for r, s in itertools.product(range(shape[2]), range(shape[3])):
        window = padded[:, :, r : r + stride * grad.shape[2] : stride, s : s + stride * grad.shape[3] : stride]
        result[:, :, r, s] = np.einsum("boPQ,biPQ->oi", grad, window)
    return result


def groups(shape: tuple[int, ...], m: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(o, number of the group within the row, r, s, first input channel): row-major over taps, then inputs."""
    out, inputs, taps_r, taps_s = shape
    for o in range(out):
        number = 0
        for r, s in itertools.product(range(taps_r), range(taps_s)):
            for first in range(0, inputs, m):
                yield o, number, r, s, first
                number += 1


def lbc_mask(live: NDArray[np.bool_], shape: tuple[int, ...], n: int, m: int) -> NDArray[np.bool_]:
    """1 where some live combination covers the position. live: [O, groups per row, C] over itertools.combinations."""
    combinations = list(itertools.combinations(range(m), n))
    mask = np.zeros(shape, dtype=bool)
    for o, number, r, s, first in groups(shape, m):
        for c, kept in enumerate(combinations):
            if live[o, number, c]:
                for j in kept:
                    mask[o, first + j, r, s] = True
    return mask


def lbc_score_gradient(live: NDArray[np.bool_], w: Array, g: Array, n: int, m: int) -> Array:
    """dL/dscore_c = live_c * sum over j in c of W_j g_j, with g the gradient of W * mask; zero in a decided group."""
    combinations = list(itertools.combinations(range(m), n))
    result = np.zeros(live.shape)
    for o, number, r, s, first in groups(w.shape, m):
        if live[o, number].sum() > 1:
            for c, kept in enumerate(combinations):
                if live[o, number, c]:
                    result[o, number, c] = sum(w[o, first + j, r, s] * g[o, first + j, r, s] for j in kept)
    return result


def top_n(values: list[float], n: int) -> set[int]:
    """Positions of the n largest magnitudes, the lower one first among equals."""
    return set(sorted(range(len(values)), key=lambda j: (-abs(values[j]), j))[:n])


def forward_mask(w: Array, n: int, m: int) -> Array:
    """Bi-Mask's F: top-N magnitudes of each input-axis group."""
    mask = np.zeros(w.shape)
    for o, _, r, s, first in groups(w.shape, m):
        for j in top_n([w[o, first + j, r, s] for j in range(m)], n):
            mask[o, first + j, r, s] = 1
    return mask


def backward_mask(w: Array, forward: Array, order: list[int], n: int, m: int) -> Array:
    """Bi-Mask's B: with the rows of W * F in the given order, top-N of each output-axis group; a subset of F."""
    mask = np.zeros(w.shape)
    masked = w * forward
    for i, r, s in itertools.product(range(w.shape[1]), range(w.shape[2]), range(w.shape[3])):
        for first in range(0, w.shape[0], m):
            rows = order[first : first + m]
            for j in top_n([masked[row, i, r, s] for row in rows], n):
                mask[rows[j], i, r, s] = forward[rows[j], i, r, s]
    return mask


def brute_force_mask(weight: NDArray[Any], n: int, m: int, axis: int) -> NDArray[np.bool_]:
    """Sort every group by (-|w|, position) and keep the first n, one group at a time."""
    rows = np.moveaxis(np.abs(weight), axis, -1)
    mask = np.zeros(rows.shape, dtype=bool)
    for index in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            group = rows[index][start : start + m]
            for position in sorted(range(m), key=lambda j: (-group[j], j))[:n]:
                mask[index][start + position] = True
    return np.moveaxis(mask, -1, axis)
