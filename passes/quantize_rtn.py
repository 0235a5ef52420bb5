"""Round to nearest: every weight takes the closest code, on the whole range of its group or on a range of least squared error.

Guarantee: with `search=minmax` every weight moves by at most half a step (`scale / 2`), plus the rounding of the stored scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.edit import Editor
from ..ir.sites import WeightSite
from .base import Decision, Guarantee, SiteResult
from .calibrate import Statistics
from .context import Context
from .quantizing import AffineQuantization
from .ranges import find_range


@dataclass(frozen=True, kw_only=True)
class QuantizeRtn(AffineQuantization):
    """Affine codes of `weight: [N, K]` without data. Embeddings need `kinds=[embedding]`."""

    guarantee: ClassVar[Guarantee] = Guarantee.BOUNDED

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Find ranges, round, pack."""
        matrix, fmt = site.matrix().float(), self.format_at(site)
        scale, zero = find_range(fmt, matrix, self.search)
        payload = fmt.pack(fmt.quantize(matrix, scale, zero), scale, zero)
        return self.write(editor, site, matrix, fmt, payload, {}, f"rounded to nearest, {self.search.value} range")
