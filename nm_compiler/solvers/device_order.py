"""Bi-Mask's backward order searched on the device where the importance lies, by plain torch operations.

A round takes a random slot out of up to 128 random groups. A row there counts in a column if it is among the ``n`` largest,
which is to say above the n-th largest of its group's other rows; with t that threshold, putting row a into the slot is worth

    sum max(a, t) = (sum a + sum t + sum |a - t|) / 2

and the first two sums are the same however the rows are dealt out, so one table of L1 distances tells what any exchange
gains. Exchanges of two slots and rings of three are made that are the best for each of their members, all at once, a few
times over. Nothing waits for the device inside a round. Where there is triton,
`nm_compiler.solvers.order_triton` does the same in a launch. Ref: Bi-Mask, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 128
"""Groups of a round: rings are found in a table of its cube."""
DEALS = 2
"""Times that the slots of a round are dealt out anew: more gain little."""
ROUNDING = 1e-6
"""Of a distance: gains below may be none."""
PATIENCE = 16
"""Rounds without a change, beside one for every group, after which a search ends."""
_LOOK = 16  # rounds after which the host asks whether anything still changes
_NUMBERS = 1 << 21  # sorted at once


def exchanged(values: Tensor, order: Tensor, n: int, m: int, *, moves: int, seed: int) -> Tensor:
    """An order that keeps more of ``values`` or as much, up to rounding: see `kept_importance`.

    values: float32 ``[rows, columns]``, finite, not negative; order: int64 ``[rows]`` on the same device, two groups of ``m``
    or more; moves: slots that are dealt out, all rounds together. Ends early when as many rounds as there are groups, and
    `PATIENCE` more, change nothing. Deterministic for a seed; the draws do not depend on the device.
    """
    groups = len(order) // m
    patience = groups + PATIENCE
    members = order.clone()
    idle = torch.zeros((), dtype=torch.int64, device=values.device)
    for number, places in enumerate(drawn(groups, m, moves, seed).to(values.device)):
        if number % _LOOK == 0 and int(idle) > patience:
            break
        inside, rows = members.view(groups, m)[places // m], members[places]
        own = values[rows]
        dealt = _dealt(torch.cdist(_thresholds(values, inside, own, n), own, p=1.0))
        taken = torch.where(idle > patience, rows, rows[dealt])
        members[places] = taken
        idle = torch.where((taken == rows).all(), idle + 1, 0)
    return members


def drawn(groups: int, m: int, moves: int, seed: int) -> Tensor:
    """For every round up to `AT_ONCE` places of an order, each in another group: int64 ``[rounds, places]`` on the CPU.

    Rounds that follow each other go through all groups, as far as they divide, before a group is taken again.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    count = min(AT_ONCE, groups)
    rounds = -(-moves // count)
    slots = torch.randint(m, (rounds, count), generator=generator)
    if count == groups:
        return slots + m * torch.arange(groups)
    in_turn = groups // count
    shuffled = torch.rand(-(-rounds // in_turn), groups, generator=generator).argsort(1)
    return slots + m * shuffled[:, : in_turn * count].reshape(-1, count)[:rounds]


def _thresholds(values: Tensor, inside: Tensor, own: Tensor, n: int) -> Tensor:
    """The ``n``-th largest of the other rows of each group, by column. inside: ``[count, m]``; own: the rows in the slots."""
    found = []
    step = max(1, _NUMBERS // (inside.shape[1] * values.shape[1]))
    for rows, mine in zip(inside.split(step), own.split(step), strict=True):
        sorted_ = values[rows].sort(dim=1, descending=True).values
        last, next_ = sorted_[:, n - 1], sorted_[:, n]
        found.append(torch.where(mine >= last, next_, last))
    return torch.cat(found)


def _dealt(worth: Tensor) -> Tensor:
    """Whose row each slot gets so that the sum of ``worth[slot, row]`` grows: a permutation, int64. worth: ``[count, count]``.

    Slot s gets t's row, t gets u's, u gets s's; two slots exchange theirs where u is s. Such a ring is made if its members
    agree that none gains more.
    """
    count = len(worth)
    slots = torch.arange(count, device=worth.device)
    dealt, least = slots, ROUNDING * worth.diagonal().mean()
    for _ in range(DEALS):
        gain = worth - worth.diagonal().unsqueeze(1)
        other = gain.clone().fill_diagonal_(-torch.inf)
        rings = other.unsqueeze(2) + (other.unsqueeze(0) + gain.t().unsqueeze(1))  # [s, t, u]
        most, best = rings.flatten(1).max(1)  # t * count + u
        ring = torch.where(most > least, best, slots * (count + 1))  # of one slot, which every other ring disagrees with
        second, third = ring // count, ring % count
        swap, last = third == slots, slots * count + second  # the same ring from where its last member stands
        agree = (ring[second] == torch.where(swap, last, third * count + slots)) & (swap | (ring[third] == last))
        made = torch.where(agree, second, slots)
        dealt, worth = dealt[made], worth[:, made]
    return dealt
