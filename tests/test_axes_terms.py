"""Laws of axis terms: whatever is unified, split or cut, sizes stay, nothing is lost, and no term contains itself."""

from __future__ import annotations

from math import prod

from hypothesis import given, settings
from hypothesis import strategies as st

from nm_compiler.axes.dependence import settle
from nm_compiler.axes.terms import Term, Terms

SIZES = st.sampled_from([2, 3, 4, 6])
SHAPES = st.recursive(
    SIZES, lambda inner: st.tuples(st.sampled_from("ps"), st.lists(inner, min_size=2, max_size=3)), max_leaves=5
)


def build(terms: Terms, shape: object) -> Term:
    """A number is a leaf; ``("p", shapes)`` a product; ``("s", shapes)`` a sum."""
    if isinstance(shape, int):
        return terms.leaf(shape)
    assert isinstance(shape, tuple)
    kind, parts = shape
    return (terms.product if kind == "p" else terms.sum)([build(terms, part) for part in parts])


def measured(terms: Terms, term: Term, above: frozenset[int] = frozenset()) -> int:
    """The size of a term from that of its leaves; fails where a term contains itself."""
    term = terms.find(term)
    assert id(term) not in above
    below = above | {id(term)}
    sizes = [measured(terms, part, below) for part in term.parts]
    if term.kind == "leaf":
        return term.size
    if term.kind == "family":
        assert len(set(sizes)) == 1
        return sizes[0]
    return prod(sizes) if term.kind == "product" else sum(sizes)


def whole(terms: Terms, *found: Term) -> None:
    for term in found:
        assert measured(terms, term) == terms.find(term).size == term.size


@given(SHAPES, SHAPES)
@settings(max_examples=80, deadline=None)
def test_unifying_keeps_sizes_and_pins_both_or_makes_them_alike(first: object, second: object) -> None:
    terms = Terms()
    a, b = build(terms, first), build(terms, second)
    terms.unify(a, b, "why")
    whole(terms, a, b)
    mine, theirs = list(terms.leaves(a)), list(terms.leaves(b))
    if a.size != b.size:
        assert all(leaf.pinned for leaf in mine + theirs)
    else:
        free = [{id(leaf) for leaf in leaves if not leaf.pinned and leaf.size > 1} for leaves in (mine, theirs)]
        assert free[0] == free[1]


@given(SHAPES, SHAPES, SHAPES)
@settings(max_examples=50, deadline=None)
def test_unifying_twice_says_nothing_new(first: object, second: object, third: object) -> None:
    terms = Terms()
    a, b, c = (build(terms, shape) for shape in (first, second, third))
    for left, right in ((a, b), (b, c)):
        terms.unify(left, right, "why")
    before = [[(id(leaf), leaf.pinned) for leaf in terms.leaves(term)] for term in (a, b, c)]
    for left, right in ((a, b), (b, c), (b, a), (a, a)):
        if left.size == right.size:
            terms.unify(left, right, "why")
    whole(terms, a, b, c)
    assert [[(id(leaf), leaf.pinned) for leaf in terms.leaves(term)] for term in (a, b, c)] == before


@given(SHAPES, SIZES)
@settings(max_examples=80, deadline=None)
def test_a_split_gives_two_factors_of_the_sizes_asked_for_or_pins(shape: object, slow: int) -> None:
    terms = Terms()
    term = build(terms, shape)
    pair = terms.split_product(term, slow, "why")
    whole(terms, term)
    if pair is None:
        assert all(leaf.pinned for leaf in terms.leaves(term))
        return
    whole(terms, *pair)
    assert (pair[0].size, pair[1].size) == (slow, term.size // slow)
    again = terms.split_product(term, slow, "why")
    assert again is not None
    assert [list(map(id, terms.leaves(part))) for part in pair] == [list(map(id, terms.leaves(part))) for part in again]


@given(SHAPES, st.data())
@settings(max_examples=80, deadline=None)
def test_pieces_add_up_to_what_was_cut(shape: object, data: st.DataObject) -> None:
    terms = Terms()
    term = build(terms, shape)
    marks = sorted(data.draw(st.lists(st.integers(0, term.size), max_size=3)))
    sizes = [b - a for a, b in zip([0, *marks], [*marks, term.size], strict=True)]
    pieces = terms.cut(term, sizes, "why")
    whole(terms, term, *pieces)
    assert [piece.size for piece in pieces] == sizes
    free = {id(leaf) for piece in pieces for leaf in terms.leaves(piece) if not leaf.pinned and leaf.size > 1}
    assert free <= {id(leaf) for leaf in terms.leaves(term)}, "what a piece can be permuted by belongs to the whole"


def test_a_leaf_that_depends_on_another_has_a_member_for_each_of_its_parts() -> None:
    terms = Terms()
    rows, dim = terms.leaf(3), terms.leaf(4)
    terms.offer(dim, [rows])
    first, rest = terms.cut(rows, [1, 2], "why")
    one, other = terms.within(dim, first, rows), terms.within(dim, rest, rows)
    assert terms.find(dim).kind == "family"
    assert terms.find(one) is not terms.find(other)
    assert terms.within(dim, rows, rows) is terms.find(dim)
    whole(terms, dim, one, other)


def test_an_axis_without_dependence_is_the_same_in_every_part() -> None:
    terms = Terms()
    rows, dim = terms.leaf(3), terms.leaf(4)
    first, _ = terms.cut(rows, [1, 2], "why")
    assert terms.within(dim, first, rows) is dim


def test_a_part_that_comes_twice_keys_no_family() -> None:
    terms = Terms()
    half, dim = terms.leaf(2), terms.leaf(3)
    rows = terms.sum([half, half])
    terms.offer(dim, [rows])
    assert terms.within(dim, half, rows) is dim


def test_a_family_whose_keys_become_one_has_one_order() -> None:
    terms = Terms()
    rows, dim = terms.leaf(4), terms.leaf(3)
    terms.offer(dim, [rows])
    first, second = terms.cut(rows, [2, 2], "why")
    one, other = terms.within(dim, first, rows), terms.within(dim, second, rows)
    terms.unify(first, second, "why")
    settle(terms, [(rows, dim)])
    assert terms.find(one) is terms.find(other)


def test_a_leaf_never_becomes_part_of_itself() -> None:
    terms = Terms()
    rows, dim = terms.leaf(2), terms.leaf(3)
    terms.offer(dim, [rows])
    first, _ = terms.cut(rows, [1, 1], "why")
    member = terms.within(dim, first, rows)
    terms.unify(member, dim, "why")
    whole(terms, member, dim)
    assert terms.find(member).pinned


def test_a_dependence_survives_only_where_its_row_is_told_once() -> None:
    for extra, kept in (((), True), (("dim",), False), (("rows", "rows", "dim"), False)):
        terms = Terms()
        found = {"rows": terms.leaf(2), "dim": terms.leaf(4)}
        terms.offer(found["dim"], [found["rows"]])
        settle(terms, [(found["rows"], found["dim"]), tuple(found[name] for name in extra)])
        assert bool(found["dim"].needs) is kept


def test_what_depends_on_a_dependent_names_both() -> None:
    terms = Terms()
    group, head, dim = terms.leaf(2), terms.leaf(3), terms.leaf(4)
    terms.offer(head, [group])
    terms.offer(dim, [head])
    settle(terms, [(group, head, dim)])
    assert {id(need) for need in dim.needs} == {id(group), id(head)}


def test_of_two_leaves_that_depend_on_each_other_the_first_goes_before() -> None:
    terms = Terms()
    a, b = terms.leaf(2), terms.leaf(3)
    terms.offer(a, [b])
    terms.offer(b, [a])
    settle(terms, [(a, b)])
    assert (len(a.needs), len(b.needs)) in {(0, 1), (1, 0)}
