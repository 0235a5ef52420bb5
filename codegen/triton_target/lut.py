"""Learned tables for the Triton kernels: one table for the matrix as 256 pairs of entries, or a table of 8-bit integers a row in four registers."""

from __future__ import annotations

from ...ir.formats.lut import Lut, TableType
from ..target import No, Support, Yes
from .layout import Structure, Values
from .pack import Source
from .path import Stored, TritonPath

MOST_ENTRIES = 16


def table_kind(fmt: Lut) -> Values:
    """One table for the matrix, or one a row."""
    return Values.SHARED if fmt.rows_per_table is None else Values.ROWS


class LutPath(TritonPath):
    """Tables of at most 16 entries: of any type that the compute dtype holds exactly when the matrix shares one, of 8-bit integers when rows have their own."""

    def supports(self, stored: Stored) -> Support:
        """Entries must be exact in the compute dtype."""
        fmt = stored.format
        assert isinstance(fmt, Lut)
        if fmt.entries > MOST_ENTRIES:
            return No(f"tables of {fmt.entries} entries; the kernels hold {MOST_ENTRIES}")
        if fmt.table is TableType.INT8:
            return Yes()
        if fmt.rows_per_table is not None:
            return No(f"row tables of {fmt.table.value}; the kernels hold 8-bit ones (table=int8)")
        table = stored.payload["table"]
        exact = bool((table.to(stored.dtype).to(table.dtype) == table).all())
        return Yes() if exact else No(f"{fmt.table.value} entries are not exact in {stored.dtype}; use table=int8")

    def source(self, stored: Stored) -> tuple[Source, Structure]:
        """Codes `[N, K] uint8`, one table `[1, E]` or one a row `[N, E] int8`, scales `[N, 1]`."""
        fmt = stored.format
        assert isinstance(fmt, Lut)
        codes, _ = fmt.unpack(stored.payload, stored.rows, stored.columns)
        table, scale = stored.payload["table"], stored.payload.get("scale")
        kind = table_kind(fmt)
        source = Source(
            kind=kind,
            values=codes,
            dtype=stored.dtype,
            scale=scale,
            table=table if kind is Values.SHARED else fmt.spread(table, stored.rows),
        )
        return source, Structure.DENSE
