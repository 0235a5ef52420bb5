"""Bitmaps for the Triton kernels: presence words, the values of a tile in one run behind their offsets."""

from __future__ import annotations

from ...ir.formats.base import WeightFormat
from .layout import Structure, Values
from .sparse_source import SparsePath


class BitmapPath(SparsePath):
    """16-bit floats, affine codes, or codes into one table; tables of rows have no kernel."""

    def structure(self, fmt: WeightFormat, kind: Values) -> Structure:
        """Any number of values a word."""
        return Structure.BITMAP
