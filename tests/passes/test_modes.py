"""Modes: products, balance, padding of primes."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.passes.modes import balanced_modes, padding, prime_factors


@pytest.mark.parametrize(
    ("size", "count", "modes"),
    [(216, 3, (6, 6, 6)), (4096, 2, (64, 64)), (576, 2, (24, 24)), (1536, 2, (32, 48)), (11008, 3, (16, 16, 43)), (8, 4, (1, 2, 2, 2))],
)
def test_sizes_of_models(size: int, count: int, modes: tuple[int, ...]) -> None:
    assert balanced_modes(size, count) == modes and padding(size, modes) == 0


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), count=st.integers(1, 4))
def test_modes_hold_the_size(size: int, count: int) -> None:
    modes = balanced_modes(size, count)
    assert len(modes) == count and prod(modes) >= size and padding(size, modes) <= max(0.15 * size, 4)


def test_primes_are_padded() -> None:
    assert balanced_modes(97, 2) == (7, 14) and padding(97, (7, 14)) == 1
    assert prime_factors(360) == [2, 2, 2, 3, 3, 5] and prime_factors(97) == [97] and prime_factors(1) == []
