"""The split keeps the most sensitive weights first, then the largest of the rest, as many as asked."""

from __future__ import annotations

import torch

from fxpress.passes.lut.split import kept_apart, kept_count

from ...tiny import randn


def test_sensitive_first_then_the_largest_of_the_rest() -> None:
    matrix, weights = randn(20, 50), randn(20, 50, seed=1).square()
    mask = kept_apart(matrix, weights, 0.01, 0.02)
    assert int(mask.sum()) == kept_count(1000, 0.01, 0.02) == 30
    sensitive = torch.zeros(1000, dtype=torch.bool)
    sensitive[weights.flatten().topk(10).indices] = True
    rest = matrix.abs().flatten().masked_fill(sensitive, -1.0)
    assert bool(mask.flatten()[sensitive].all())
    assert bool(mask.flatten()[rest.topk(20).indices].all())


def test_nothing_asked_keeps_nothing() -> None:
    assert not bool(kept_apart(randn(4, 5), None, 0.0, 0.0).any())


def test_column_weights_are_spread_over_the_rows() -> None:
    weights = torch.arange(8.0).expand(4, 8)
    assert bool(kept_apart(randn(4, 8), weights, 0.125, 0.0)[:, 7].all())
