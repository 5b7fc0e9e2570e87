"""Bi-Mask's backward orders searched on a GPU, as `nm_compiler.solvers.device_order` does, in few launches.

All rounds of a weight are one program of a launch, and weights with the same pattern and about as many groups are programs of
the same launch. A weight that would keep one multiprocessor busy for too long gets two launches a round instead: one that
sums parts of the table of distances, with a program for every part, and one that adds the parts up, in their order, and deals
out the slots. Nothing waits for the device. Importing this module needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _entry(values, members, first, mine, j, column, there, columns, sign):  # type: ignore[no-untyped-def]
    """Row j of every group, times sign, by column; -inf where it is the group's own slot. first: the groups' first places."""
    row = tl.load(members + first + j).to(tl.int64)
    value = tl.load(values + row[:, None] * columns + column[None, :], mask=there, other=0.0)
    return tl.where((mine == j)[:, None], float("-inf"), value * sign)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _thresholds(values, members, first, mine, column, there, columns, n: tl.constexpr, m: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ``n``-th largest of each group's other rows, ``[groups, columns]``, counted from the smallest if that is nearer."""
    near: tl.constexpr = n <= m - n
    k: tl.constexpr = n if near else m - n
    sign: tl.constexpr = 1.0 if near else -1.0
    below = tl.full(there.shape, float("-inf"), tl.float32)
    if k <= 2:
        most = below
        for j in tl.static_range(m):
            value = _entry(values, members, first, mine, j, column, there, columns, sign)
            below = tl.maximum(below, tl.minimum(most, value))
            most = tl.maximum(most, value)
        if k == 1:
            below = most
    else:
        below = tl.full(there.shape, float("inf"), tl.float32)
        at = tl.full(there.shape, -1, tl.int32)
        for _ in range(k):  # the largest of those that come after the last one
            most = tl.full(there.shape, float("-inf"), tl.float32)
            place = tl.full(there.shape, -1, tl.int32)
            for j in range(m):
                value = _entry(values, members, first, mine, j, column, there, columns, sign)
                better = ((value < below) | ((value == below) & (j > at))) & (value > most)
                most, place = tl.where(better, value, most), tl.where(better, j, place)
            below, at = most, place
    return below * sign


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _distances(values, members, places, out, start, begin, end, columns, count, n: tl.constexpr, m: tl.constexpr, high: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Write ``sum |own_a - threshold_s|`` over columns begin to end to ``out[s, a]``, for ``high`` slots and ``wide`` rows.

    start: the tile's number. A tile's thresholds and its rows are as many numbers as there are threads, or more: were they
    fewer, each warp would load all of them.
    """
    slot = start // (block // wide) * high + tl.arange(0, high)
    other = start % (block // wide) * wide + tl.arange(0, wide)
    place = tl.load(places + slot, mask=slot < count, other=0)
    mine = place % m
    row = tl.load(members + tl.load(places + other, mask=other < count, other=0)).to(tl.int64)
    total = tl.zeros([high, wide, width], tl.float32)
    for at in range(begin, end, width):
        column = at + tl.arange(0, width)
        there = (other < count)[:, None] & (column < end)[None, :]
        own = tl.load(values + row[:, None] * columns + column[None, :], mask=there, other=0.0)
        inside = (slot < count)[:, None] & (column < end)[None, :]
        threshold = _thresholds(values, members, place - mine, mine, column, inside, columns, n, m)
        total += tl.abs(own[None, :, :] - threshold[:, None, :])
    tl.store(out + slot[:, None] * block + other[None, :], tl.sum(total, axis=2))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gains(worth, dealt, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what each slot gains by another's row, as it is dealt now, behind worth: ``[slot, other]`` and turned.

    -inf for the slot's own row, and where there is no slot.
    """
    slot = tl.arange(0, block)
    across, down = slot[None, :], slot[:, None]
    theirs = tl.load(worth + down * block + tl.load(dealt + slot)[None, :])
    own = tl.load(worth + slot * block + tl.load(dealt + slot))
    gain = tl.where((down < count) & (across < count) & (down != across), theirs - own[:, None], float("-inf"))
    tl.store(worth + block * block + down * block + across, gain)
    tl.store(worth + 2 * block * block + across * block + down, gain)
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _best_rings(straight, turned, out, count, high: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Write ``out[s, u] = max over t of gain[s, t] + gain[t, u]``: the best way from s to u."""
    for start in range(0, count, high):
        slot = start + tl.arange(0, high)
        for beside in range(0, count, wide):
            last = beside + tl.arange(0, wide)
            best = tl.full([high, wide, width], float("-inf"), tl.float32)
            for at in range(0, count, width):
                middle = at + tl.arange(0, width)
                first = tl.load(straight + slot[:, None] * block + middle[None, :])
                then = tl.load(turned + last[:, None] * block + middle[None, :])
                best = tl.maximum(best, first[:, None, :] + then[None, :, :])
            tl.store(out + slot[:, None] * block + last[None, :], tl.max(best, axis=2))
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _deal(worth, dealt, count, least, high: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, way: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Make the rings that all their members like best, see `device_order`. worth, dealt: with scratch, see `all_rounds`."""
    straight, turned, ways = worth + block * block, worth + 2 * block * block, worth + 3 * block * block
    _gains(worth, dealt, count, block)
    _best_rings(straight, turned, ways, count, high, block, wide, way)
    slot = tl.arange(0, block)
    across, down = slot[None, :], slot[:, None]
    there = (down < count) & (across < count)
    back = tl.where(down == across, 0.0, tl.load(turned + down * block + across))
    ring = tl.where(there, tl.load(ways + down * block + across, mask=there, other=0.0) + back, float("-inf"))
    good = tl.max(ring, axis=1) > least
    third = tl.where(good, tl.argmax(ring, axis=1), slot)
    way_there = tl.load(straight + down * block + across) + tl.load(turned + third[:, None] * block + across)
    second = tl.where(good, tl.argmax(way_there, axis=1), slot)
    seconds, thirds = dealt + block, dealt + 2 * block
    tl.store(seconds + slot, second)
    tl.store(thirds + slot, third)
    tl.debug_barrier()
    swap = third == slot
    agree = (tl.load(seconds + second) == tl.where(swap, slot, third)) & (
        tl.load(thirds + second) == tl.where(swap, second, slot)
    )
    agree = agree & (swap | ((tl.load(seconds + third) == slot) & (tl.load(thirds + third) == second)))
    taken = tl.load(dealt + tl.where(agree, second, slot))
    tl.debug_barrier()
    tl.store(dealt + slot, taken)
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exchange(worth, dealt, members, places, count, high: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, way: tl.constexpr, deals: tl.constexpr, rounding: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Deal the rows of a round out and put them into their new places. Returns how many changed."""
    slot = tl.arange(0, block)
    there = slot < count
    tl.store(dealt + slot, slot)
    least = rounding * tl.sum(tl.load(worth + slot * (block + 1), mask=there, other=0.0), axis=0) / count
    tl.debug_barrier()
    for _ in range(deals):
        _deal(worth, dealt, count, least, high, block, wide, way)
    taken = tl.load(dealt + slot)
    row = tl.load(members + tl.load(places + taken, mask=there, other=0), mask=there, other=0)
    tl.debug_barrier()
    tl.store(members + tl.load(places + slot, mask=there, other=0), row, mask=there)
    tl.debug_barrier()
    return tl.sum((taken != slot).to(tl.int32), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def all_rounds(values, members, places, tasks, worth, dealt, n: tl.constexpr, m: tl.constexpr, high: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, width: tl.constexpr, way: tl.constexpr, deals: tl.constexpr, rounding: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """A program searches one order. values: float32; members: int32, the orders; places: int32, see `device_order.drawn`.

    tasks: int64 ``[programs, 7]``, where a program's values, members and places begin, how many idle rounds it waits for,
    slots of a round, rounds and columns it has; worth, dealt: scratch, float32 ``[programs, 4, block, block]`` and int32
    ``[programs, 3, block]``. Tiles: ``high`` slots, ``wide`` rows or slots, and ``width`` columns or ``way`` slots.
    """
    program = tl.program_id(0)
    task = tasks + program * 7
    values += tl.load(task)
    members += tl.load(task + 1)
    places += tl.load(task + 2)
    patience, count = tl.load(task + 3).to(tl.int32), tl.load(task + 4).to(tl.int32)
    rounds, columns = tl.load(task + 5).to(tl.int32), tl.load(task + 6).to(tl.int32)
    worth += program * 4 * block * block
    dealt += program * 3 * block
    tiles = (count + high - 1) // high * (block // wide)
    number, idle = 0, 0
    while (number < rounds) & (idle <= patience):
        mine = places + number * count
        for tile in range(tiles):
            _distances(values, members, mine, worth, tile, 0, columns, columns, count, n, m, high, block, wide, width)
        tl.debug_barrier()
        changed = _exchange(worth, dealt, members, mine, count, high, block, wide, way, deals, rounding)
        idle = tl.where(changed > 0, 0, idle + 1)
        number += 1


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def part_of_round(values, members, places, idle, parts, patience, columns, length, count, n: tl.constexpr, m: tl.constexpr, high: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """Programs ``[tiles, parts]`` sum ``length`` columns of a tile of distances each. parts: ``[parts, block, block]``."""
    if tl.load(idle) <= patience:
        part = tl.program_id(1)
        begin = part * length
        end = tl.minimum(begin + length, columns)
        out = parts + part * block * block
        tile = tl.program_id(0)
        _distances(values, members, places, out, tile, begin, end, columns, count, n, m, high, block, wide, width)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def end_of_round(members, places, idle, parts, worth, dealt, patience, number, count, high: tl.constexpr, block: tl.constexpr, wide: tl.constexpr, way: tl.constexpr, deals: tl.constexpr, rounding: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    """One program adds up ``number`` parts and deals the slots out. idle: int32, rounds that changed nothing since one did."""
    before = tl.load(idle)
    if before <= patience:
        slot = tl.arange(0, block)
        place = slot[:, None] * block + slot[None, :]
        total = tl.zeros([block, block], tl.float32)
        for part in range(number):
            total += tl.load(parts + part * block * block + place)
        tl.store(worth + place, total)
        tl.debug_barrier()
        changed = _exchange(worth, dealt, members, places, count, high, block, wide, way, deals, rounding)
        tl.store(idle, tl.where(changed > 0, 0, before + 1))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def kept(values, orders, sums, rows, columns, n: tl.constexpr, m: tl.constexpr, tall: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """Programs ``[groups, parts, orders]`` add the ``n`` largest of ``m`` rows of a group over ``width`` columns, in float64.

    values: ``[rows, columns]``; orders: int64 ``[orders, rows]``; sums: float64 ``[orders, parts, groups]``; tall: m, up to a
    power of two.
    """
    group, part, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = tl.arange(0, tall)
    column = part * width + tl.arange(0, width)
    row = tl.load(orders + which * rows + group * m + entry, mask=entry < m, other=0)
    there = (entry < m)[:, None] & (column < columns)[None, :]
    value = tl.load(values + row[:, None] * columns + column[None, :], mask=there, other=float("-inf"))
    mine, other = value[:, None, :], value[None, :, :]
    first = (entry[None, :] < entry[:, None])[:, :, None]
    rank = tl.sum(((other > mine) | ((other == mine) & first)).to(tl.int32), axis=1)
    largest = tl.where((rank < n) & there, value.to(tl.float64), 0.0)
    place = (which * tl.num_programs(1) + part) * tl.num_programs(0) + group
    tl.store(sums + place, tl.sum(tl.sum(largest, axis=1), axis=0))
