"""Compiled work on packed live sets, a kernel for each number of weights in a group, made when it is first asked for.

All arrays have one axis a part of a weight: ``[out, taps, groups, ..]``, with any strides; taps is 1 for a linear layer.

    live     uint8 ``[.., ceil(C / 8)]``, one bit a combination, see `nm_compiler.solvers.combinations`
    words    uint ``[ceil(C / 8), 256]``: for a byte of a live set, the union of its combinations, a byte a position
    members  int64 ``[C, N]``: the positions of a combination
    mask, weight, grad, ...   ``[.., M]``
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from nm_compiler.solvers.jit import jit
from nm_compiler.solvers.search_kernels import Array

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""The integer that holds a byte for each of M positions, by M."""


@jit
def cover_words(live: Array, words: Array, full: Any, mask: Array) -> None:
    """The union of the live combinations of every group. mask: words ``[out, taps, groups]``."""
    for o in range(live.shape[0]):
        for t in range(live.shape[1]):
            for g in range(live.shape[2]):
                word = words[0, live[o, t, g, 0]]
                for b in range(1, live.shape[3]):
                    if word == full:
                        break
                    word |= words[b, live[o, t, g, b]]
                mask[o, t, g] = word


@cache
def cover_bytes(m: int) -> Callable[[Array, Array, Any, Array], None]:
    """The same where the positions of a group do not lie side by side. mask: uint8 ``[out, taps, groups, M]``."""

    @jit
    def cover(live: Array, words: Array, full: Any, mask: Array) -> None:
        for o in range(live.shape[0]):
            for t in range(live.shape[1]):
                for g in range(live.shape[2]):
                    word = np.uint64(words[0, live[o, t, g, 0]])
                    for b in range(1, live.shape[3]):
                        if word == full:
                            break
                        word |= np.uint64(words[b, live[o, t, g, b]])
                    for j in range(m):
                        mask[o, t, g, j] = np.uint8(word >> np.uint64(8 * j)) & np.uint8(1)

    return cover


@jit
def any_decided(live: Array) -> bool:
    """Whether a group has at most one live combination. live: ``[groups, ceil(C / 8)]``."""
    decided = 0
    if live.shape[1] == 1:
        flat = live.reshape(-1)
        for g in range(flat.size):
            decided += (flat[g] & (flat[g] - np.uint8(1))) == 0
        return decided > 0
    for g in range(live.shape[0]):
        seen, several = 0, np.uint8(0)
        for b in range(live.shape[1]):
            byte = live[g, b]
            if byte != 0:
                seen += 1
                several |= byte & (byte - np.uint8(1))
                if several != 0 or seen > 1:
                    break
        decided += several == 0 and seen < 2
    return decided > 0


@cache
def gradients(m: int) -> Callable[[Array, Array, Array, Array, Array, Array], None]:
    """dW = mask * g, dS = W * dW; no score gradient in a group with at most one live combination."""

    @jit
    def gradients(grad: Array, weight: Array, mask: Array, live: Array, grad_weight: Array, grad_scores: Array) -> None:
        for o in range(live.shape[0]):
            for t in range(live.shape[1]):
                for g in range(live.shape[2]):
                    seen, several = 0, np.uint8(0)
                    for b in range(live.shape[3]):
                        byte = live[o, t, g, b]
                        several |= byte & (byte - np.uint8(1))
                        seen += byte != 0
                    factor = weight.dtype.type((several != 0) | (seen > 1))
                    for j in range(m):  # loaded whether they are kept or not, so that the loop has no branch
                        given, value = grad[o, t, g, j], weight[o, t, g, j]
                        through = given if mask[o, t, g, j] != 0 else grad.dtype.type(0)
                        grad_weight[o, t, g, j] = through
                        grad_scores[o, t, g, j] = value * through * factor

    return gradients


@cache
def retiring(n: int) -> Callable[[Array, Array, Array, int, Array], None]:
    """Clear the lowest-scored bits of every live set until ``keep`` are left; of equals the last go first, NaN is lowest."""

    @jit
    def retire(scores: Array, live: Array, members: Array, keep: int, kept: Array) -> None:
        combinations, most = members.shape[0], 3.4e38
        values, places = np.empty(combinations + 1), np.empty(combinations + 1, np.int64)
        own = np.empty(scores.shape[3])
        for o in range(live.shape[0]):
            for t in range(live.shape[1]):
                for g in range(live.shape[2]):
                    for j in range(own.size):
                        own[j] = scores[o, t, g, j]
                    count = 0
                    for c in range(combinations):  # all are summed, which costs less than a branch each
                        value = 0.0
                        for k in range(n):
                            value += own[members[c, k]]
                        if not value >= -most:
                            value = -most
                        values[count] = min(value, most)
                        places[count] = c
                        count += (live[o, t, g, c >> 3] >> (c & 7)) & 1
                    if count <= keep:
                        for b in range(live.shape[3]):
                            kept[o, t, g, b] = live[o, t, g, b]
                    elif count - keep <= keep:
                        for b in range(live.shape[3]):
                            kept[o, t, g, b] = live[o, t, g, b]
                        for _ in range(count - keep):
                            worst = 0
                            for i in range(1, count):
                                if values[i] <= values[worst]:
                                    worst = i
                            c, values[worst] = places[worst], np.inf
                            kept[o, t, g, c >> 3] &= ~(1 << (c & 7)) & 255
                    else:
                        for b in range(live.shape[3]):
                            kept[o, t, g, b] = 0
                        for _ in range(keep):
                            best = 0
                            for i in range(1, count):
                                if values[i] > values[best]:
                                    best = i
                            c, values[best] = places[best], -np.inf
                            kept[o, t, g, c >> 3] |= 1 << (c & 7)

    return retire
