"""N:M sparsity for the Triton kernels: 2:4 by byte permutes; other patterns, and codes into tables, as balanced words of 32 columns."""

from __future__ import annotations

from ...ir.formats.base import WeightFormat
from ...ir.formats.nm import Nm
from .layout import Structure, Values
from .sparse_source import TABLES, SparsePath


class NmPath(SparsePath):
    """Any kind of value. The expansion saves memory traffic, not products: the tensor cores compute dense."""

    def structure(self, fmt: WeightFormat, kind: Values) -> Structure:
        """2:4 has a kernel of its own."""
        assert isinstance(fmt, Nm)
        return Structure.TWO_OF_FOUR if (fmt.keep, fmt.group) == (2, 4) and kind not in TABLES else Structure.BALANCED
