"""What the quantization passes share: which width a site gets, legality, the edit and its measured facts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.errors import PassError
from ..ir.formats.affine import Affine, Granularity, ScaleType
from ..ir.formats.base import WeightFormat
from ..ir.program import Program
from ..ir.site_calls import why_not_compressible
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..ir.spec import option
from .base import Decision, SitePass, SiteResult
from .context import Context
from .ranges import RangeSearch

PRUNED_FRACTION = 0.1  # a site with this many exact zeros counts as pruned
MATRICES = (SiteKind.LINEAR, SiteKind.ADDMM, SiteKind.MM, *CONVOLUTIONS)
PLANNED_BITS = "fxpress_bits"  # key of a site's planned width in its node's meta, where `allocate_bits` leaves it


@dataclass(frozen=True, kw_only=True)
class Quantization(SitePass):
    """Options of every quantizer. `bits` None: each site takes the width that `allocate_bits` planned for it. `kinds` are the site kinds taken.

    A tied lm_head is quantized like any other. It goes on sharing its storage with the embedding if both come out with equal codes (the same options, and
    nothing of the data in them); else each has its own.
    """

    bits: int | None = option(None, ge=1, le=8)
    kinds: tuple[SiteKind, ...] = MATRICES

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """As given in `kinds`."""
        return frozenset(self.kinds)

    def bits_at(self, site: WeightSite) -> int | None:
        """The width of this site's codes, or None when nothing says."""
        planned = site.node.meta.get(PLANNED_BITS)
        return self.bits if self.bits is not None else planned

    @abstractmethod
    def format_of(self, site: WeightSite, bits: int) -> WeightFormat:
        """The format for a site at a width."""

    def planned_format(self, site: WeightSite) -> WeightFormat:
        """The format the site will hold."""
        return self.format_of(site, self.known_bits(site))

    def known_bits(self, site: WeightSite) -> int:
        """The width of this site's codes; PassError when nothing says."""
        bits = self.bits_at(site)
        if bits is None:
            raise PassError(f"{self.name} at {site}: {self._no_bits}")
        return bits

    @property
    def _no_bits(self) -> str:
        return f"no width is given: write {self.name}{{bits=4}}, or put allocate_bits before it"

    def why_not(self, site: WeightSite) -> str | None:
        """Sites without an fxpress operator, already compressed, without a width, or that the format cannot hold."""
        reason = why_not_compressible(site)
        if reason is None and self.bits_at(site) is None:
            reason = self._no_bits
        return reason or self.planned_format(site).why_illegal(site.rows, site.columns)

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """The new format and its exact bytes."""
        fmt = self.planned_format(site)
        after = fmt.nbytes(site.rows, site.columns, site.dtype)
        return Decision(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, flops=self.flops(site))

    def flops(self, site: WeightSite) -> float:
        """Rough floating-point operations spent on the site."""
        return 8.0 * site.parameters

    def write(
        self, editor: Editor, site: WeightSite, matrix: Tensor, fmt: WeightFormat, payload: Mapping[str, Tensor], facts: Mapping[str, float], why: str
    ) -> SiteResult:
        """Compress the site with a payload; adds what was measured against `matrix: [N, K]`."""
        decoded = fmt.decode(payload, site.rows, site.columns, torch.float32)
        known = _facts(matrix, decoded) | dict(facts) | {"bits_per_weight": fmt.bits_per_weight(site.rows, site.columns, site.dtype)}
        known |= {"untied": 1.0} if site.tied else {}
        editor.compress(site, fmt, payload, why, known)
        after = sum(t.nbytes for t in payload.values())
        return SiteResult(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, facts=known)

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Say whether zeros left by pruning stayed exactly zero, and which sites stopped sharing a weight."""
        tied = {s.name for s in program.sites() if s.tied}
        untied = [r.site for r in results if "untied" in r.facts and r.site not in tied]
        sharing = f"{', '.join(untied)}: no longer shares its weight; a tied site that is not compressed keeps the dense one"
        return (*_on_zeros(results), *([sharing] if untied else []))


@dataclass(frozen=True, kw_only=True)
class AffineQuantization(Quantization):
    """Options of every pass that ends in the `affine` format.

    `group_size` inputs share a scale (none: the whole row; `granularity=tensor`: the whole matrix).
    """

    group_size: int | None = option(None, ge=1)
    symmetric: bool = False
    granularity: Granularity | None = None
    scale_dtype: ScaleType = ScaleType.FLOAT16
    search: RangeSearch = RangeSearch.MIN_MAX

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.affine(self.bits or 4)  # a contradiction between group_size and granularity is refused here

    def affine(self, bits: int) -> Affine:
        """The weight format at a width."""
        return Affine(bits=bits, group_size=self.group_size, symmetric=self.symmetric, granularity=self.granularity, scale_dtype=self.scale_dtype)

    def format_of(self, site: WeightSite, bits: int) -> Affine:
        """As the options say."""
        return self.affine(bits)

    def format_at(self, site: WeightSite) -> Affine:
        """The format of a site whose width is known."""
        return self.affine(self.known_bits(site))

    def flops(self, site: WeightSite) -> float:
        """A search tries 25 ranges."""
        return (8.0 * 25 if self.search is RangeSearch.MSE else 8.0) * site.parameters


def _on_zeros(results: tuple[SiteResult, ...]) -> tuple[str, ...]:
    pruned = [r for r in results if r.facts.get("zeros_before", 0.0) >= PRUNED_FRACTION]
    if not pruned:
        return ()
    lost = sum(r.facts["zeros_lost"] for r in pruned)
    kept = "all stayed exactly zero" if lost == 0 else f"{int(lost)} of them became non-zero"
    return (f"{len(pruned)} sites came in pruned (at least {PRUNED_FRACTION:.0%} zeros): {kept}; each zero still takes a code",)


def _facts(matrix: Tensor, decoded: Tensor) -> dict[str, float]:
    zeros = matrix == 0
    return {
        "relative_error": float((matrix - decoded).norm() / matrix.norm().clamp_min(1e-30)),
        "zeros_before": float(zeros.float().mean()),
        "zeros_lost": float((decoded[zeros] != 0).sum()),
    }
