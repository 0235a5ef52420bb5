"""Monotone least squares: against a brute-force grid, and what it leaves alone."""

from __future__ import annotations

from itertools import product

from fxpress.passes.isotonic import falling


def test_what_falls_stays() -> None:
    assert falling([3.0, 2.0, 2.0, 1.0]) == [3.0, 2.0, 2.0, 1.0] and falling([]) == []


def test_violators_are_pooled_to_the_least_squares_answer() -> None:
    values = [2.0, 3.0, 1.0, 2.0, 0.0]
    grid = [i / 2 for i in range(7)]
    tried = (c for c in product(grid, repeat=5) if list(c) == sorted(c, reverse=True))
    best = min(tried, key=lambda c: sum((a - b) ** 2 for a, b in zip(c, values, strict=True)))
    assert falling(values) == list(best) == [2.5, 2.5, 1.5, 1.5, 0.0]
