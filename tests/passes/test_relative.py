"""Relative errors: the root of a quotient, never negative, never complex."""

from __future__ import annotations

import pytest

from fxpress.passes.relative import relative_error


@pytest.mark.parametrize(("left", "power", "error"), [(4.0, 16.0, 0.5), (-1e-9, 16.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_values(left: float, power: float, error: float) -> None:
    assert relative_error(left, power) == error
