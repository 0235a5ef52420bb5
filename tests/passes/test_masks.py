"""Exact counts under ties, N:M structure, and the histogram selection against a full sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.ir.errors import SpecError
from fxpress.passes.masks import below, kth_smallest, lowest_of_all, lowest_of_pattern, lowest_per_row, parse_pattern


@given(seed=st.integers(0, 2**31), levels=st.integers(1, 6), rows=st.integers(1, 9), columns=st.integers(1, 33), data=st.data())
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_even_when_scores_tie(seed: int, levels: int, rows: int, columns: int, data: st.DataObject) -> None:
    score = torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float() * 0.37
    count = data.draw(st.integers(0, rows * columns))
    mask = lowest_of_all(score, count)
    assert int(mask.sum()) == count
    if 0 < count < mask.numel():
        assert score[mask].max() <= score[~mask].min()
    per_row = lowest_per_row(score, count % (columns + 1))
    assert (per_row.sum(1) == count % (columns + 1)).all()


@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 200), min_size=1, max_size=5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_kth_smallest_equals_a_sort_over_all_tensors(seed: int, sizes: list[int], data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, generator=generator).abs() * 10.0 ** float(torch.randint(-8, 8, (), generator=generator)) for n in sizes]
    everything = torch.cat(parts).sort().values
    count = data.draw(st.integers(1, len(everything)))
    value, ties = kth_smallest(lambda: parts, count)
    assert value == float(everything[count - 1])
    assert ties == count - int((everything < value).sum())


def test_pattern_keeps_the_highest_of_every_group() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 9.0]])
    assert lowest_of_pattern(score, 2, 4).tolist() == [[False, True, False, True, True, True, False, False]]


def test_below_takes_the_first_ties_only() -> None:
    assert below(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2.0, 2).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("bad", ["4:2", "2:2", "0:4", "2-4", "", "two:four"])
def test_bad_patterns_are_refused(bad: str) -> None:
    with pytest.raises(SpecError, match="expected N:M"):
        parse_pattern(bad)
