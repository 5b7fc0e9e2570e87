"""Axis terms: what is known about the order of the entries along one tensor axis.

    leaf                  an axis of its own: one class, permuted by one order, or pinned
    product(a, b)         a reshape merged two axes, a slow and a fast one
    sum(a, b)             a concatenation: the entries of ``a``, then those of ``b``
    family{k1: a, k2: b}  the entries are ordered as ``a`` where another axis of the same tensor is in its part ``k1``, and as
                          ``b`` where it is in ``k2``: what is left of ``reshape(3, heads, dim)`` once it was unbound

A leaf may also *depend* on other leaves: ``dim`` on ``heads`` after ``reshape(heads, dim)`` means one order per head.
Dependences are offered here and proven in `nm_compiler.axes.dependence`.

Terms are unified as in type inference: union-find over leaves, refined where structures meet. What does not fit is pinned,
never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod


@dataclass(eq=False, slots=True)
class Term:
    """One axis. size: its length; parent: the term it was unified with; parts: of a product, sum or family.

    keys: of a family, the parts of the other axis; needs: of a leaf, the leaves that its order may depend on;
    pinned: why a leaf may not be permuted, or None.
    """

    size: int
    serial: int
    kind: str = "leaf"
    parts: tuple[Term, ...] = ()
    keys: tuple[Term, ...] = ()
    needs: list[Term] = field(default_factory=list)
    pinned: str | None = None
    parent: Term | None = None


Split = Callable[[Term, int, str], "tuple[Term, Term] | None"]


class Terms:
    """The terms of one analysis. Every method keeps what was known and adds to it; nothing is ever taken back."""

    def __init__(self) -> None:
        self._serial = count()
        self.families = 0  # made so far from leaves that depend on a part
        self.one = self.leaf(1)

    def leaf(self, size: int, pinned: str | None = None, needs: Iterable[Term] = ()) -> Term:
        """A new axis of ``size`` entries that nothing is known about."""
        return Term(size, next(self._serial), pinned=pinned, needs=list(needs))

    def product(self, factors: Iterable[Term]) -> Term:
        """The axis that a reshape makes of ``factors``, slowest first. Factors of size 1 say nothing."""
        flat = [inner for factor in factors for inner in self._flat(factor, "product") if inner.size != 1]
        if len(flat) < 2:
            return flat[0] if flat else self.one
        return Term(prod(t.size for t in flat), next(self._serial), "product", tuple(flat))

    def sum(self, parts: Iterable[Term]) -> Term:
        """The axis that a concatenation makes of ``parts``."""
        flat = [inner for part in parts for inner in self._flat(part, "sum") if inner.size != 0]
        if len(flat) < 2:
            return flat[0] if flat else self.leaf(0)
        return Term(sum(t.size for t in flat), next(self._serial), "sum", tuple(flat))

    def family(self, keys: Sequence[Term], parts: Sequence[Term]) -> Term:
        """The axis ordered as ``parts[i]`` where another axis of the tensor is in its part ``keys[i]``."""
        if len(parts) == 1 or all(self.find(p) is self.find(parts[0]) for p in parts):
            return self.find(parts[0])
        return Term(parts[0].size, next(self._serial), "family", tuple(parts), tuple(keys))

    def _flat(self, term: Term, kind: str) -> Iterator[Term]:
        term = self.find(term)
        if term.kind == kind:
            for part in term.parts:
                yield from self._flat(part, kind)
        else:
            yield term

    def factors(self, term: Term) -> list[Term]:
        """The factors of a product, or the term itself."""
        return [t for t in self._flat(term, "product") if t.size != 1]

    def summands(self, term: Term) -> list[Term]:
        """The parts of a sum, or the term itself."""
        return [t for t in self._flat(term, "sum") if t.size != 0]

    def find(self, term: Term) -> Term:
        """The term that stands for ``term`` now."""
        root = term
        while root.parent is not None:
            root = root.parent
        while term.parent is not None:
            term.parent, term = root, term.parent
        if root.kind == "family" and all(self.find(p) is self.find(root.parts[0]) for p in root.parts[1:]):
            root.parent = self.find(root.parts[0])
            return root.parent
        return root

    def leaves(self, term: Term) -> Iterator[Term]:
        """Every leaf of a term, in the order of its entries; those of all members of a family."""
        term = self.find(term)
        if term.kind == "leaf":
            yield term
        for part in term.parts:
            yield from self.leaves(part)

    # --- what is said about terms ---------------------------------------------------------------------------------

    def pin(self, term: Term, why: str) -> None:
        """No order but the identity for anything in ``term``. The first reason is the one that is kept."""
        for leaf in self.leaves(term):
            leaf.pinned = leaf.pinned or why

    def unify(self, a: Term, b: Term, why: str) -> None:
        """Both axes are permuted alike. Where their structures cannot meet, both are pinned with ``why``."""
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        if a.size != b.size or a.size == 0:
            self._pin_both(a, b, why)
        elif a.kind == "leaf" or b.kind == "leaf":
            self._bind(a, b, why) if a.kind == "leaf" else self._bind(b, a, why)
        elif "family" in (a.kind, b.kind):
            self._unify_families(a, b, why)
        else:
            apart, split = (
                (self.factors, self.split_product) if a.kind == b.kind == "product" else (self.summands, self.split_sum)
            )
            if self._zip(apart(a), apart(b), split, why) and self.find(a) is a and self.find(b) is not a:
                a.parent = self.find(b)

    def _pin_both(self, a: Term, b: Term, why: str) -> None:
        self.pin(a, why)
        self.pin(b, why)

    def _bind(self, leaf: Term, other: Term, why: str) -> None:
        if other.kind != "leaf" and any(inner is leaf for inner in self.leaves(other)):
            self._pin_both(leaf, other, why)
            return
        if leaf.size == 1 and (leaf is self.one or other is self.one):
            return
        leaf.parent = other
        if leaf.pinned:
            self.pin(other, leaf.pinned)
        if leaf.needs:
            self.offer(other, leaf.needs)
            leaf.needs = []

    def offer(self, term: Term, needs: Iterable[Term]) -> None:
        """The order of every leaf in ``term`` may depend on ``needs``, if the graph turns out to allow it."""
        needs = list(needs)
        for leaf in self.leaves(term):
            if leaf.pinned:
                continue
            known = {id(self.find(n)) for n in leaf.needs} | {id(leaf)}
            leaf.needs.extend(n for n in needs if id(self.find(n)) not in known)

    def _unify_families(self, a: Term, b: Term, why: str) -> None:
        if a.kind == b.kind == "family":
            of_b = {id(self.find(key)): part for key, part in zip(b.keys, b.parts, strict=True)}
            matches = [of_b.get(id(self.find(key))) for key in a.keys]
            if len(of_b) == len(a.keys) and all(match is not None for match in matches):
                for part, match in zip(a.parts, matches, strict=True):
                    assert match is not None
                    self.unify(part, match, why)
                return
        for term in (a, b):
            if term.kind == "family":
                self.collapse(term, why)
        self.unify(a, b, why)

    def collapse(self, family: Term, why: str) -> None:
        """One order for all members of a family."""
        for part in family.parts[1:]:
            self.unify(family.parts[0], part, why)
        if family.parent is None:  # also where they cannot meet: all of them are pinned then
            family.parent = self.find(family.parts[0])

    def _zip(self, left: list[Term], right: list[Term], split: Split, why: str) -> bool:
        """Unify two lists of parts of equal total, splitting the larger of each pair. False, pinned, if they do not fit."""
        left, right = left[::-1], right[::-1]
        while left and right:
            a, b = self.find(left.pop()), self.find(right.pop())
            if a.size == b.size and {a.kind, b.kind} != {"product", "sum"}:
                self.unify(a, b, why)
                continue
            if a.size == b.size:  # a product meets a sum: cut the product where the sum is cut
                whole, parts = (a, self.summands(b)) if a.kind == "product" else (b, self.summands(a))
                cut = self.cut(whole, [part.size for part in parts], why)
                for piece, part in zip(cut, parts, strict=True):
                    if {self.find(piece).kind, self.find(part).kind} == {"product", "sum"}:
                        self._pin_both(piece, part, why)
                    else:
                        self.unify(piece, part, why)
                continue
            large, small = (a, b.size) if a.size > b.size else (b, a.size)
            pieces = split(large, small, why)
            if pieces is None:
                for term in (a, b, *left, *right):
                    self.pin(term, why)
                return False
            (left if large is a else right).extend(pieces[::-1])
            (right if large is a else left).append(b if large is a else a)
        return True

    # --- taking terms apart ---------------------------------------------------------------------------------------

    def split_product(self, term: Term, slow: int, why: str) -> tuple[Term, Term] | None:
        """``term`` as a product of a slow factor of size ``slow`` and a fast one. None, pinned, if it is not one."""
        term = self.find(term)
        if slow == term.size or slow == 1:
            return (term, self.one) if slow == term.size else (self.one, term)
        if slow and term.size % slow == 0:
            fast = term.size // slow
            if term.kind == "leaf":
                first = self.leaf(slow, term.pinned, term.needs)
                second = self.leaf(fast, term.pinned, [*term.needs, first])
                term.parent = self.product((first, second))
                return first, second
            if term.kind == "product":
                return self._split_factors(self.factors(term), slow, why)
            if term.kind == "family":
                pairs = [self.split_product(part, slow, why) for part in term.parts]
                if all(pair is not None for pair in pairs):
                    first, second = (self.family(term.keys, [p[i] for p in pairs if p]) for i in (0, 1))
                    return first, second
            if term.kind == "sum" and (pair := self._split_summands(self.summands(term), fast, why)):
                term.parent = self.product(pair)
                return pair
        self.pin(term, why)
        return None

    def _split_factors(self, factors: list[Term], slow: int, why: str) -> tuple[Term, Term] | None:
        head: list[Term] = []
        for index, factor in enumerate(factors):
            if slow == 1:
                return self.product(head), self.product(factors[index:])
            if slow % factor.size == 0:
                head.append(factor)
                slow //= factor.size
                continue
            pair = self.split_product(factor, slow, why) if factor.size % slow == 0 else None
            if pair is None:
                break
            rest = factors[index + 1 :]
            for inner in rest:
                self.offer(inner, pair)
            return self.product([*head, pair[0]]), self.product([pair[1], *rest])
        else:
            return self.product(head), self.one
        for factor in factors:
            self.pin(factor, why)
        return None

    def _split_summands(self, parts: list[Term], fast: int, why: str) -> tuple[Term, Term] | None:
        """Parts of a concatenation as equal rows of ``fast`` entries: the rows of each part are ordered by themselves."""
        rows: list[list[Term]] = [[]]
        for part in parts:
            rows[-1].append(part)
            if sum(t.size for t in rows[-1]) % fast == 0:
                rows.append([])
        if rows.pop() or len(rows) < 2:
            return None
        groups = [self.sum(row) for row in rows]
        pairs = [self.split_product(group, group.size // fast, why) for group in groups]
        if any(pair is None for pair in pairs):
            return None
        keys = [self.leaf(1) if pair[0] is self.one else pair[0] for pair in pairs if pair]
        return self.sum(keys), self.family(keys, [pair[1] for pair in pairs if pair])

    def split_sum(self, term: Term, size: int, why: str) -> tuple[Term, Term] | None:
        """``term`` as its first ``size`` entries and the rest. None, pinned, if the cut goes through a row."""
        term = self.find(term)
        if term.kind == "leaf":
            first, second = (self.leaf(n, term.pinned, term.needs) for n in (size, term.size - size))
            term.parent = self.sum((first, second))
            return first, second
        if term.kind == "sum":
            return self._split_run(self.summands(term), size, why)
        if term.kind == "product":
            return self._split_rows(self.factors(term), size, why)
        pairs = [self.split_sum(part, size, why) for part in term.parts]
        if all(pair is not None for pair in pairs):
            first, second = (self.family(term.keys, [p[i] for p in pairs if p]) for i in (0, 1))
            return first, second
        self.pin(term, why)
        return None

    def _split_run(self, parts: list[Term], size: int, why: str) -> tuple[Term, Term] | None:
        head: list[Term] = []
        for index, part in enumerate(parts):
            if size == 0:
                return self.sum(head), self.sum(parts[index:])
            if part.size <= size:
                head.append(part)
                size -= part.size
                continue
            pair = self.split_sum(part, size, why)
            if pair is None:
                return None
            return self.sum([*head, pair[0]]), self.sum([pair[1], *parts[index + 1 :]])
        return self.sum(head), self.leaf(0)

    def _split_rows(self, factors: list[Term], size: int, why: str) -> tuple[Term, Term] | None:
        """A cut between two rows of the slowest factor; orders that depend on the row part ways there."""
        slow, *fast = factors
        row = prod(t.size for t in fast)
        pair = self.split_sum(slow, size // row, why) if size % row == 0 else None
        if pair is None:
            for factor in factors:
                self.pin(factor, why)
            return None
        first, second = (self.product([key, *(self.within(t, key, slow) for t in fast)]) for key in pair)
        return first, second

    def cut(self, term: Term, sizes: Sequence[int], why: str) -> list[Term]:
        """``term`` in consecutive pieces of ``sizes``; pinned pieces where it cannot be cut."""
        pieces: list[Term] = []
        for index, size in enumerate(sizes[:-1]):
            pair = (self.leaf(0), term) if size == 0 else None if size >= term.size else self.split_sum(term, size, why)
            if pair is None and size == term.size:
                pair = (term, self.leaf(0))
            if pair is None:
                self.pin(term, why)
                return pieces + [self.leaf(rest, why) for rest in sizes[index:]]
            pieces.append(pair[0])
            term = pair[1]
        return [*pieces, term]

    def within(self, term: Term, part: Term, whole: Term) -> Term:
        """``term`` where the axis ``whole`` of the same tensor is in its ``part``: a member of its family, if it has one."""
        term, whole = self.find(term), self.find(whole)
        if self.find(part) is whole or part.size == 0:
            return term
        if term.kind == "leaf":
            if not any(self.find(need) is whole for need in term.needs):
                return term
            keys = self.summands(whole)
            if len({id(key) for key in keys}) < len(keys):  # a part that comes twice does not tell where an entry is
                return term
            if len(keys) < 2 or not any(self.find(key) is self.find(p) for key in keys for p in self.summands(part)):
                return term
            others = [need for need in term.needs if self.find(need) is not whole]
            members = [self.leaf(term.size, term.pinned, others + ([key] if key.size > 1 else [])) for key in keys]
            term.parent = self.family(keys, members)
            self.families += 1
            term = term.parent
        if term.kind == "family":
            wanted = self.summands(part)
            chosen = {id(self.find(key)): inner for key, inner in zip(term.keys, term.parts, strict=True)}
            if len(chosen) < len(term.keys):
                self.collapse(term, "two parts of an axis turned out to be one")
                return self.find(term)
            picked = [(key, chosen[id(self.find(key))]) for key in wanted if id(self.find(key)) in chosen]
            if len(picked) == len(wanted):
                return self.family([key for key, _ in picked], [inner for _, inner in picked])
            if any(len(self.summands(key)) > 1 for key in term.keys):  # a key was cut further
                self._refine(term)
                return self.within(term, part, whole) if self.find(term).kind == "family" else self.find(term)
            return term
        if term.kind == "product":
            return self.product([self.within(inner, part, whole) for inner in term.parts])
        return self.sum([self.within(inner, part, whole) for inner in term.parts])

    def _refine(self, family: Term) -> None:
        """A family over parts that were themselves cut becomes one over the smaller parts."""
        keys: list[Term] = []
        parts: list[Term] = []
        for key, part in zip(family.keys, family.parts, strict=True):
            smaller = self.summands(key)
            keys.extend(smaller)
            parts.extend(self.within(part, piece, key) if len(smaller) > 1 else part for piece in smaller)
        family.keys, family.parts = tuple(keys), tuple(parts)
