"""Relative errors from squared ones."""

from __future__ import annotations


def relative_error(left: float, power: float) -> float:
    """`sqrt(left / power)`. A squared error that rounding made negative, below what a float32 Gram resolves, counts as 0, and so does one of nothing."""
    return float((max(left, 0.0) / max(power, 1e-300)) ** 0.5)
