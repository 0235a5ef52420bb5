"""Sparse formats for the Triton kernels: the inner format's path takes the values apart, presence goes along."""

from __future__ import annotations

from dataclasses import replace

from ...ir.formats.base import WeightFormat
from ...ir.formats.dense import Dense
from ...ir.formats.lut import Lut
from ...ir.formats.sparse import Sparse
from ..target import No, Support, Yes, fast_path
from .layout import Structure, Values
from .lut import table_kind
from .pack import Source
from .path import Stored, TritonPath

TABLES = (Values.SHARED, Values.ROWS)


class SparsePath(TritonPath):
    """Base of the sparse formats' paths."""

    def structure(self, fmt: WeightFormat, kind: Values) -> Structure:
        """The kernel family for a format and its kind of values."""
        raise NotImplementedError

    def supports(self, stored: Stored) -> Support:
        """What the values' path says, and which values a structure has no kernel for."""
        fmt = stored.format
        assert isinstance(fmt, Sparse)
        if isinstance(fmt.inner, Dense):
            stores = stored.payload["values"].dtype
            return Yes() if stores is stored.dtype else No(f"values stored as {stores} for a product in {stored.dtype}; store them in the dtype of the model")
        answer = _inner_path(fmt).supports(replace(stored, format=fmt.inner))  # it looks at the format and at tables, which are stored whole
        if isinstance(answer, No):
            return answer
        if isinstance(fmt.inner, Lut) and table_kind(fmt.inner) is Values.ROWS and self.structure(fmt, Values.ROWS) is Structure.BITMAP:
            return No("row tables need as many values in every row, and a bitmap has none such; prune to a balanced pattern, or use rows_per_table=none")
        return Yes()

    def source(self, stored: Stored) -> tuple[Source, Structure]:
        """Values of the whole weight, with presence."""
        fmt = stored.format
        assert isinstance(fmt, Sparse)
        present, inner = fmt.unpack(stored.payload, stored.rows, stored.columns, stored.dtype)
        if isinstance(fmt.inner, Dense):
            source = Source(kind=Values.HALF, values=inner["values"], dtype=stored.dtype, present=present)
        else:
            source = replace(_inner_path(fmt).source(replace(stored, format=fmt.inner, payload=inner))[0], present=present)
        return source, self.structure(fmt, source.kind)


def _inner_path(fmt: Sparse) -> TritonPath:
    path = fast_path(__package__, fmt.inner.name, TritonPath)  # type: ignore[type-abstract]
    assert path is not None
    return path
