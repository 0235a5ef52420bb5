"""Exact counts in every piece and in all, what costs nothing goes first, and balanced groups."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.passes.removal import balanced, unstructured


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 40), width=st.integers(1, 50), share=st.floats(0, 1), data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_count_is_exact_piece_by_piece_and_at_once(seed: int, rows: int, columns: int, width: int, share: float, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator).masked_fill(torch.rand(rows, columns, generator=generator) < share / 2, 0.0)
    dead = torch.rand(columns, generator=generator) < share / 2
    count = data.draw(st.integers(0, rows * columns))
    removal = unstructured(matrix, dead, count, width)
    score = torch.randint(0, 4, (rows, columns), generator=generator).float()
    pieces = [removal.of_columns(score.t()[i : i + width], i) for i in range(0, columns, width)]
    zeros = int((matrix == 0).sum())
    for mask in (torch.cat(pieces).t(), removal.of_matrix(score)):
        assert int(mask.sum()) == max(count, zeros)
        assert mask[matrix == 0].all()


def test_pieces_take_an_even_share() -> None:
    assert unstructured(torch.ones(3, 10), torch.zeros(10, dtype=torch.bool), 15, 4).counts == [6, 6, 3]
    assert unstructured(torch.ones(1, 7), torch.zeros(7, dtype=torch.bool), 3, 2).counts == [1, 1, 1, 0]


def test_columns_no_data_reached_go_before_any_other() -> None:
    matrix, dead = torch.tensor([[1.0, 5.0, 2.0, 6.0], [1.0, 7.0, 2.0, 4.0]]), torch.tensor([False, True, False, True])
    few = unstructured(matrix, dead, 2, 4)
    assert few.of_matrix(matrix).tolist() == [[False, True, False, False], [False, False, False, True]]
    more = unstructured(matrix, dead, 5, 4)
    assert more.of_matrix(matrix).tolist() == [[True, True, False, True], [False, True, False, True]]
    pair = balanced(matrix, dead, "3:4")
    assert pair.of_matrix(matrix).tolist() == [[False, True, False, False], [False, False, False, True]]
    assert torch.equal(pair.of_columns(matrix.t(), 0), pair.of_matrix(matrix).t())


def test_balanced_groups_keep_at_most_n_and_zeros_stay_zero() -> None:
    matrix = torch.tensor([[0.0, 3.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]])
    removal = balanced(matrix, torch.zeros(8, dtype=torch.bool), "2:4")
    assert removal.of_matrix(matrix.square()).tolist() == [[True, False, True, True, True, True, False, False]]
    assert removal.of_columns(matrix[:, 4:].t(), 4).t().tolist() == [[True, True, False, False]]
