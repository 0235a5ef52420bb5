"""Affine codes for the Triton kernels: 1 to 4 bits in 4, 5 to 8 in 8; an exponent put over a code makes it a float, scales multiply sums in float32."""

from __future__ import annotations

from ...ir.formats.affine import Affine, Granularity
from ..target import No, Support, Yes
from .layout import WORD, Structure, Values
from .pack import Source
from .path import Stored, TritonPath


class AffinePath(TritonPath):
    """Any symmetric or asymmetric codes; groups of 32, 64, or a multiple of 128 columns."""

    def supports(self, stored: Stored) -> Support:
        """Groups must be whole tiles."""
        fmt = stored.format
        assert isinstance(fmt, Affine)
        width = fmt.group_width(stored.columns)
        if fmt.sharing is Granularity.GROUP and width < stored.columns and width not in (WORD, 2 * WORD) and width % (4 * WORD):
            return No(f"groups of {width} columns are no whole tiles; use group_size 32, 64 or a multiple of 128")
        return No("one-bit symmetric codes have a zero point of one half; use symmetric=false") if fmt.symmetric and fmt.bits == 1 else Yes()

    def source(self, stored: Stored) -> tuple[Source, Structure]:
        """Codes `[N, K] uint8`, scales and zero points `[N, G]`."""
        fmt = stored.format
        assert isinstance(fmt, Affine)
        codes, _, zero = fmt.unpack(stored.payload, stored.rows, stored.columns)
        scale = stored.payload["scale"]
        if fmt.sharing is Granularity.TENSOR:
            scale, zero = scale.expand(stored.rows, 1), zero.expand(stored.rows, 1)
        kind = Values.CODE4 if fmt.bits <= 4 else Values.CODE8
        group = fmt.group_width(stored.columns) if scale.shape[1] > 1 else None
        source = Source(kind=kind, values=codes, dtype=stored.dtype, scale=scale.contiguous(), zero=zero.contiguous(), group=group)
        return source, Structure.DENSE
