"""What the affine quantization passes share: options, legality, the edit and its measured facts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.edit import Editor, why_not_compressible
from ..ir.formats.affine import Affine, Granularity, ScaleType
from ..ir.program import Program
from ..ir.sites import SiteKind, WeightSite
from ..ir.spec import option
from .base import Decision, SitePass, SiteResult
from .context import Context
from .ranges import RangeSearch

PRUNED_FRACTION = 0.1  # a site with this many exact zeros counts as pruned in the report
MATRICES = (SiteKind.LINEAR, SiteKind.ADDMM, SiteKind.MM, SiteKind.CONV1D, SiteKind.CONV2D)


@dataclass(frozen=True, kw_only=True)
class AffineQuantization(SitePass):
    """Options of every pass that ends in the `affine` format.

    `group_size` inputs share a scale (none: the whole row; `granularity=tensor`: the whole matrix). `kinds` are the site kinds taken. Each site gets codes of
    its own, so a tied lm_head is quantized like any other and stops sharing storage with its embedding.
    """

    bits: int = option(ge=1, le=8)
    group_size: int | None = option(None, ge=1)
    symmetric: bool = False
    granularity: Granularity | None = None
    scale_dtype: ScaleType = ScaleType.FLOAT16
    search: RangeSearch = RangeSearch.MIN_MAX
    kinds: tuple[SiteKind, ...] = MATRICES

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.format  # a contradiction between group_size and granularity is refused here

    @property
    def format(self) -> Affine:
        """The weight format the pass writes."""
        return Affine(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, granularity=self.granularity, scale_dtype=self.scale_dtype)

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """As given in `kinds`."""
        return frozenset(self.kinds)

    def why_not(self, site: WeightSite) -> str | None:
        """Sites without an fxpress operator, already compressed, or too narrow for the group."""
        return why_not_compressible(site) or self.format.why_illegal(site.rows, site.columns)

    def planned_format(self, site: WeightSite) -> Affine:
        """The affine format."""
        return self.format

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """The new format and its exact bytes."""
        spec, after = self.format.to_spec(), self.format.nbytes(site.rows, site.columns, site.dtype)
        searched = 8.0 * 25 if self.search is RangeSearch.MSE else 8.0
        return Decision(site=site.name, action=spec, bytes_before=site.nbytes, bytes_after=after, flops=searched * site.parameters)

    def write(
        self, editor: Editor, site: WeightSite, matrix: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, facts: dict[str, float], why: str
    ) -> SiteResult:
        """Compress the site with codes `[N, K]` and scales `[N, G]`; adds what was measured against `matrix: [N, K]`."""
        payload = self.format.pack(codes, scale, zero)
        decoded = self.format.decode(payload, site.rows, site.columns, torch.float32)
        facts = _facts(matrix, decoded) | facts | {"bits_per_weight": self.format.bits_per_weight(site.rows, site.columns, site.dtype)}
        facts |= {"untied": 1.0} if site.tied else {}
        editor.compress(site, self.format, payload, why, facts)
        after = sum(t.nbytes for t in payload.values())
        return SiteResult(site=site.name, action=self.format.to_spec(), bytes_before=site.nbytes, bytes_after=after, facts=facts)

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Say whether zeros left by pruning stayed exactly zero, and which sites stopped sharing a weight."""
        untied = [r.site for r in results if "untied" in r.facts]
        sharing = f"{', '.join(untied)}: no longer shares its weight; a tied site that is not compressed keeps the dense one"
        return (*self._on_zeros(results), *([sharing] if untied else []))

    def _on_zeros(self, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        pruned = [r for r in results if r.facts.get("zeros_before", 0.0) >= PRUNED_FRACTION]
        if not pruned:
            return ()
        lost = sum(r.facts["zeros_lost"] for r in pruned)
        kept = "all stayed exactly zero" if lost == 0 else f"{int(lost)} of them became non-zero"
        return (f"{len(pruned)} sites came in pruned (at least {PRUNED_FRACTION:.0%} zeros): {kept}; each zero still takes a code in the affine format",)


def _facts(matrix: Tensor, decoded: Tensor) -> dict[str, float]:
    zeros = matrix == 0
    return {
        "relative_error": float((matrix - decoded).norm() / matrix.norm().clamp_min(1e-30)),
        "zeros_before": float(zeros.float().mean()),
        "zeros_lost": float((decoded[zeros] != 0).sum()),
    }
