"""Balanced sparsity for the Triton kernels: a fixed number of values for every word of 32 columns."""

from __future__ import annotations

from ...ir.formats.base import WeightFormat
from .layout import Structure, Values
from .sparse_source import SparsePath


class BalancedPath(SparsePath):
    """Any kind of value. Room for the power of two at or above the most values that 32 columns hold."""

    def structure(self, fmt: WeightFormat, kind: Values) -> Structure:
        """As many values a word everywhere."""
        return Structure.BALANCED
