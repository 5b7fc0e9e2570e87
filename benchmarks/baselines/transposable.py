"""Transposable masks as others make them: all tiles of a matrix at once, in torch; and their optimum by linear programming."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor


def tiles(matrix: Tensor, m: int) -> Tensor:
    """``[rows / M, columns / M, M, M]`` of a matrix."""
    parts: Tensor = matrix.unflatten(1, (-1, m)).unflatten(0, (-1, m)).movedim(2, 1)
    return parts


def untiled(parts: Tensor) -> Tensor:
    """The matrix that `tiles` was made of."""
    return parts.movedim(1, 2).flatten(2, 3).flatten(0, 1)


def by_enumeration(importance: Tensor) -> Tensor:
    """2:4: weigh the 90 masks with two of four in every row and column by a matrix product, as apex does."""
    rows = torch.tensor([row for row in itertools.product((0.0, 1.0), repeat=4) if sum(row) == 2])
    choice = torch.cartesian_prod(*[torch.arange(6)] * 4)
    masks = rows[choice]
    masks = masks[(masks.sum(dim=1) == 2).all(dim=1)].flatten(1)
    parts = tiles(importance, 4)
    best = (parts.reshape(-1, 16) @ masks.T).argmax(dim=1)
    return untiled(masks[best].reshape(parts.shape))


def two_approximation(importance: Tensor, n: int, m: int) -> Tensor:
    """Take the entries of a tile from the largest to the smallest wherever row and column have room.

    Ref: Hubara et al., NeurIPS 2021, algorithm 1; every tile in step with the others, the entries of rows and columns counted
    anew for each entry, as the released code does.
    """
    parts = tiles(importance, m)
    flat = parts.reshape(-1, m * m)
    falling = flat.argsort(dim=1, descending=True)
    every = torch.arange(len(flat))
    mask = torch.zeros_like(flat)
    for k in range(m * m):
        at = falling[:, k]
        if k >= n:
            grid = mask.view(-1, m, m)
            room = (grid.sum(dim=2)[every, at // m] < n) & (grid.sum(dim=1)[every, at % m] < n)
            mask[every[room], at[room]] = 1
        else:
            mask[every, at] = 1
    return untiled(mask.reshape(parts.shape))


def lean_approximation(importance: Tensor, n: int, m: int) -> Tensor:
    """The same mask with counts that are kept, not taken anew: the fastest we could write it in torch."""
    parts = tiles(importance, m)
    flat = parts.reshape(-1, m * m)
    falling = flat.argsort(dim=1, descending=True).T.contiguous()
    every = torch.arange(len(flat)) * m
    rows, columns = (torch.zeros(len(flat) * m, dtype=torch.int32) for _ in range(2))
    mask = torch.zeros(len(flat) * m * m)
    for at in falling:
        row, column = every + at // m, every + at % m
        room = ((rows[row] < n) & (columns[column] < n)).to(torch.int32)
        mask[every * m + at] = room.float()
        rows[row] += room
        columns[column] += room
    return untiled(mask.reshape(parts.shape))


def optimum(tile: np.ndarray, n: int) -> float:
    """What the best mask of one tile keeps, by linear programming: the polytope of these masks has whole corners."""
    m = len(tile)
    each_row, each_column = np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))
    found = linprog(-tile.ravel(), np.vstack([each_row, each_column]), np.full(2 * m, n), bounds=(0, 1), method="highs")
    return float(-found.fun)
