"""Prove which orders may differ from row to row, and give up the others.

``reshape(heads, dim)`` offers ``dim`` a dependence on ``heads``: an order of its own in every head. That is sound only if
wherever an entry is indexed by ``dim``, it is indexed by ``heads`` too, and once: in every tensor, inside every product
(which entries are multiplied and summed) and across every op that mixes entries along an axis. The analysis records all
of these as *spaces*; a dependence that one space contradicts is dropped, so that one order serves all rows.

A family (see `nm_compiler.axes.terms`) is held to the same law, part by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nm_compiler.axes.terms import Term, Terms

Space = tuple[Term, ...]
_MANY = 256  # alternatives of one space; beyond, its dependences are dropped unproven


def settle(terms: Terms, spaces: Sequence[Space]) -> None:
    """Drop every dependence and collapse every family that a space contradicts, until none is left."""
    spaces = list({tuple(id(t) for t in space): space for space in spaces}.values())
    changed = True
    while changed:
        changed = False
        for space in spaces:
            if any(_concerns(terms, term) for term in space):
                changed |= _hold(terms, space, [_MANY])
    leaves = {id(leaf): leaf for space in spaces for term in space for leaf in terms.leaves(term)}
    _order(terms, sorted(leaves.values(), key=lambda leaf: leaf.serial))


def _concerns(terms: Terms, term: Term) -> bool:
    term = terms.find(term)
    if term.kind == "family":
        return True
    if term.kind == "leaf":
        return bool(term.needs) and not term.pinned
    return any(_concerns(terms, part) for part in term.parts)


def _hold(terms: Terms, space: Space, budget: list[int]) -> bool:
    """Whether something had to be given up so that this space holds."""
    if not any(_concerns(terms, term) for term in space):
        return False
    budget[0] -= 1
    if budget[0] < 0:
        return _give_up(terms, space)
    # an axis of one entry stays: it may be a part of another, and tell which
    space = tuple(factor for term in space for factor in terms.factors(term) or (terms.find(term),))
    for index, whole in enumerate(space):
        if whole.kind == "sum" and _matters(terms, space, whole):
            changed, before = False, terms.families
            others = (*space[:index], *space[index + 1 :])
            once = not _meet(terms, whole, others)
            for part in terms.summands(whole):
                rest = tuple(terms.within(other, part, whole) for other in others) if once else others
                changed |= _hold(terms, (part, *rest), budget)
            return changed or terms.families != before
    return _hold_parts(terms, space, budget)


def _matters(terms: Terms, space: Space, whole: Term) -> bool:
    """Whether the parts of a concatenation have to be looked at one by one."""
    if _concerns(terms, whole):
        return True
    parts = {id(whole)} | {id(part) for part in terms.summands(whole)}
    asked = [need for term in space for leaf in terms.leaves(term) if not leaf.pinned for need in leaf.needs]
    asked += [key for term in space for family in _families(terms, term) for key in family.keys]
    return any(id(part) in parts for term in asked for part in (terms.find(term), *terms.summands(term)))


def _meet(terms: Terms, whole: Term, others: Space) -> bool:
    """Whether a part of ``whole`` is indexed by another axis too: which part an entry lies in then has two answers."""
    mine = {id(leaf) for leaf in terms.leaves(whole)}
    return any(id(leaf) in mine for other in others for leaf in terms.leaves(other))


def _hold_parts(terms: Terms, space: Space, budget: list[int]) -> bool:
    """A space of leaves and families: each entry of a family belongs to a part that must be in the space by now."""
    found = [terms.find(term) for term in space]
    present = [id(term) for term in found]
    families = [term for term in found if term.kind == "family"]
    if families:
        changed = False
        for family in families:
            part = [
                member
                for key, member in zip(family.keys, family.parts, strict=True)
                if present.count(id(terms.find(key))) == 1
            ]
            if len(part) != 1:
                terms.collapse(family, "one order for all parts")
                return True
            changed |= _hold(terms, tuple(part[0] if term is family else term for term in found), budget)
            return changed
    changed = False
    for leaf in found:
        if leaf.needs and not leaf.pinned:
            held = [need for need in leaf.needs if _holds(terms, need, present, leaf)]
            changed |= len(held) != len(leaf.needs)
            leaf.needs = held
    return changed


def _holds(terms: Terms, need: Term, present: list[int], leaf: Term) -> bool:
    parts = terms.factors(need)
    return bool(parts) and all(part is not leaf and present.count(id(part)) == 1 for part in parts)


def _give_up(terms: Terms, space: Space) -> bool:
    changed = False
    for term in space:
        for family in list(_families(terms, term)):
            terms.collapse(family, "one order for all parts")
            changed = True
        for leaf in terms.leaves(term):
            changed |= bool(leaf.needs)
            leaf.needs = []
    return changed


def _families(terms: Terms, term: Term) -> Iterator[Term]:
    term = terms.find(term)
    if term.kind == "family":
        yield term
    for part in term.parts:
        yield from _families(terms, part)


def _order(terms: Terms, leaves: Sequence[Term]) -> None:
    """Leaves that come before what depends on them: cycles broken, and what is needed indirectly named as well.

    Of two leaves that depend on each other, the one that was met first goes before. Where ``dim`` depends on ``head`` and that
    on ``group``, the order of ``dim`` after ``head`` has moved is only told with the group.
    """
    for leaf in leaves:
        if leaf.pinned:
            leaf.needs = []
    for leaf in leaves:
        needs = {id(part): part for need in leaf.needs for part in terms.factors(need)}
        leaf.needs = []
        leaf.needs = [part for part in needs.values() if part.kind == "leaf" and not _reaches(terms, part, leaf)]
    for leaf in leaves:
        found: dict[int, Term] = {}
        stack = leaf.needs[::-1]
        while stack:
            need = stack.pop()
            if id(need) not in found:
                found[id(need)] = need
                stack.extend(need.needs[::-1])
        leaf.needs = list(found.values())


def _reaches(terms: Terms, start: Term, goal: Term) -> bool:
    stack, seen = [start], set()
    while stack:
        term = terms.find(stack.pop())
        if term is goal:
            return True
        if id(term) not in seen:
            seen.add(id(term))
            stack.extend(part for need in term.needs for part in terms.factors(need))
    return False
