import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nm_compiler import NMError, Pattern
from nm_compiler.pattern import PatternMap, combination_table

patterns = st.integers(2, 64).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(patterns)
def test_a_pattern_reads_back_from_its_own_text(nm: tuple[int, int]) -> None:
    assert Pattern.parse(str(Pattern(*nm))) == Pattern(*nm) == Pattern.parse(nm)


@pytest.mark.parametrize(
    "wrong", ["4:2", "2:x", "2", "", "0:4", "4:4", "2:65", "-1:4", (2, 4, 8), (2.0, 4), 3, None, ("2", "4")]
)
def test_anything_else_is_refused_with_an_example_of_a_pattern(wrong: object) -> None:
    with pytest.raises(NMError, match=r"N:M|must be smaller"):
        Pattern.parse(wrong)  # type: ignore[arg-type]


def test_a_swapped_pattern_is_pointed_out() -> None:
    with pytest.raises(NMError, match="did you mean '2:4'"):
        Pattern.parse("4:2")


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "4:8", "2:8", "1:16", "4:16"])
def test_the_table_lists_all_combinations_in_itertools_order(text: str) -> None:
    pattern = Pattern.parse(text)
    kept = [tuple(row.nonzero().flatten().tolist()) for row in combination_table(pattern)]
    assert kept == list(itertools.combinations(range(pattern.m), pattern.n))
    assert combination_table(pattern).dtype == torch.uint8


def test_a_pattern_with_too_many_combinations_has_no_table_and_says_what_to_use() -> None:
    assert not Pattern(8, 16).has_table
    with pytest.raises(NMError, match="12870.*position"):
        combination_table(Pattern(8, 16))


def test_the_first_matching_glob_decides_the_pattern() -> None:
    patterns = PatternMap.parse({"layer4.*": "1:4", "layer?.conv.*": (2, 8), "*": "2:4"})
    assert patterns.of("layer4.conv.weight") == Pattern(1, 4)
    assert patterns.of("layer1.conv.weight") == Pattern(2, 8)
    assert patterns.of("fc.weight") == Pattern(2, 4)
    assert PatternMap.parse({"layer4.*": "1:4"}).of("fc.weight") is None


def test_an_empty_mapping_of_patterns_is_refused() -> None:
    with pytest.raises(NMError, match="matches no weight"):
        PatternMap.parse({})
