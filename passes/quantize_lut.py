"""Learned tables: every weight becomes a code into a small table of its row, chosen so that the loss moves least; a few weights stay apart, exact.

Sources: the objective, weighted k-means of every row, and the split are SqueezeLLM's (Kim et al., ICML 2024, arXiv 2306.07629); the refinement under
the guided Gram is LNQ with GuidedQuant (Kim et al., ICML 2025, arXiv 2505.07004). Ours: the k-means is solved exactly (`lut/segments`), tables lie on an
8-bit grid (an eighth of the published size, and exact in ONNX), the Gram is of the model as quantized so far. Zeros of a pruned weight stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.errors import SpecError
from ..ir.formats.affine import ScaleType
from ..ir.formats.base import WeightFormat
from ..ir.formats.composite import Composite
from ..ir.formats.lut import Lut, TableType
from ..ir.formats.sparse_outliers import SparseOutliers
from ..ir.sites import WeightSite
from ..ir.spec import option
from .base import Decision, Guarantee, Guidance, Need, SiteResult
from .calibrate import Statistics, why_not_observable
from .context import Context
from .lut.fit import Fit, Problem, fit_tables, refine_tables
from .lut.split import kept_apart, kept_count
from .quantizing import PRUNED_FRACTION, Quantization
from .sensitivities import row_parts, row_weights


class Sensitivity(Enum):
    """What weights the squared error of a weight in the clustering."""

    GUIDED = "guided"  # the diagonal of the guided Gram
    FISHER = "fisher"  # squared gradients per sample, as published
    GRAM = "gram"  # the diagonal of the input Gram
    UNIFORM = "uniform"  # all weights alike: needs no data


class Refine(Enum):
    """What follows the clustering."""

    LNQ = "lnq"
    OFF = "off"


@dataclass(frozen=True, kw_only=True)
class QuantizeLut(Quantization):
    """Tables of `2^bits` entries (or `entries`), one for `rows_per_table` rows (none: one for the matrix), for `weight: [N, K]`.

    `sensitive` and `outliers` are the fractions of weights kept apart in float16. `groups` parts of the output channels get a guided Gram of their own, in
    which squared output gradients count by their `power`: 1 as published, 0 the plain Gram. Few calibration tokens want less than 1: a handful of large
    gradients then no longer outvotes all others (measured on 8,192 tokens: docs/passes/quantize_lut.md).
    `rounds` of least-squares tables with `cycles` of coordinate descent each; `damping` is the share of the mean curvature added to the diagonal.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    entries: int | None = option(None, ge=2, le=256)
    rows_per_table: int | None = option(1, ge=1)
    table: TableType = TableType.INT8
    scale_dtype: ScaleType = ScaleType.FLOAT16
    outliers: float = option(0.0, ge=0.0, lt=0.5)
    sensitive: float = option(0.0, ge=0.0, lt=0.5)
    sensitivity: Sensitivity = Sensitivity.GUIDED
    refine: Refine = Refine.LNQ
    groups: int = option(1, ge=1)
    power: float = option(0.5, ge=0.0, le=1.0)
    rounds: int = option(3, ge=1)
    cycles: int = option(4, ge=1)
    damping: float = option(0.05, ge=0.0)
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine is Refine.LNQ and self.sensitivity is Sensitivity.UNIFORM:
            raise SpecError("quantize_lut: sensitivity=uniform uses no data, but refine=lnq needs a Gram; set refine=off too")
        if self.sensitive and self.sensitivity is Sensitivity.UNIFORM:
            raise SpecError("quantize_lut: sensitive= needs to know the sensitive weights, but sensitivity=uniform uses no data; use outliers= alone")

    @property
    def needs(self) -> Need:
        """The guided Gram to refine under (the plain one for `sensitivity=gram`), and what the clustering weighs by."""
        known = {Sensitivity.GUIDED: Need.GUIDED, Sensitivity.FISHER: Need.FISHER, Sensitivity.GRAM: Need.GRAM, Sensitivity.UNIFORM: Need.NONE}
        refined = Need.GRAM if self.sensitivity is Sensitivity.GRAM else Need.GUIDED
        return known[self.sensitivity] | (refined if self.refine is Refine.LNQ else Need.NONE)

    @property
    def guidance(self) -> Guidance:
        """As given in `groups` and `power`."""
        return Guidance(self.groups, self.power)

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites quantized; clustering without a Gram sees no data at all."""
        return self.sequential

    def bits_at(self, site: WeightSite) -> int | None:
        """From `entries` when they are given."""
        return (self.entries - 1).bit_length() if self.entries is not None else super().bits_at(site)

    def format_of(self, site: WeightSite, bits: int) -> WeightFormat:
        """`lut`, or its sum with `sparse_outliers`."""
        lut = self._lut(bits)
        count = kept_count(site.parameters, self.sensitive, self.outliers)
        return Composite(parts=(lut.to_spec(), SparseOutliers(count=count).to_spec())) if count else lut

    def _lut(self, bits: int) -> Lut:
        return Lut(entries=self.entries or 2**bits, rows_per_table=self.rows_per_table, table=self.table, scale_dtype=self.scale_dtype)

    def why_not(self, site: WeightSite) -> str | None:
        """As for all quantizers; where data are needed, the site's rows must be observable."""
        unseen = why_not_observable(site) if self.needs is not Need.NONE else None
        return unseen or super().why_not(site)

    def flops(self, site: WeightSite) -> float:
        """Sorting and clustering, and under LNQ about one row of the Gram for every changed code."""
        refined = 4.0 * site.columns * self.rounds if self.refine is Refine.LNQ else 0.0
        return (400.0 + refined) * site.parameters

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Split, cluster, refine, store."""
        matrix, lut = site.matrix().float(), self._lut(self.known_bits(site))
        weights = self._weights(site, statistics)
        kept = kept_apart(matrix, weights, self.sensitive, self.outliers)
        zeros = matrix == 0
        pruned = zeros if float(zeros.float().mean()) >= PRUNED_FRACTION else torch.zeros_like(zeros)
        problem = Problem(matrix=matrix, weights=weights, kept=kept, pruned=pruned, fmt=lut, parts=self._row_counts(site))
        fit = fit_tables(problem)
        facts = {"kept_apart": float(kept.sum())}
        if self.refine is Refine.LNQ:
            grams = self._grams(site, statistics)
            before = fit.error(problem, grams)
            fit = refine_tables(problem, fit, grams, rounds=self.rounds, cycles=self.cycles)
            facts |= {"guided_error_before": before, "guided_error": fit.error(problem, grams)}
        return self._store(editor, site, problem, fit, facts)

    def _weights(self, site: WeightSite, statistics: Statistics | None) -> Tensor | None:
        """`[N, K] f32` weights of the squared errors, or None for all alike."""
        if statistics is None:
            return None
        if self.sensitivity is Sensitivity.FISHER:
            return statistics.fisher[site.name]
        found = statistics.gram if self.sensitivity is Sensitivity.GRAM else statistics.guided[site.name]
        assert found is not None
        return row_weights(site, found.diagonal(dim1=1, dim2=2))

    def _row_counts(self, site: WeightSite) -> tuple[int, ...]:
        """Rows under each Gram."""
        return tuple(len(p) for p in row_parts(site, 1 if self.sensitivity is Sensitivity.GRAM else self.groups))

    def _grams(self, site: WeightSite, statistics: Statistics | None) -> list[Tensor]:
        """The damped Gram of every part of the rows."""
        assert statistics is not None
        found = statistics.gram if self.sensitivity is Sensitivity.GRAM else statistics.guided[site.name]
        assert found is not None
        return [g + self.damping * float(g.diagonal().mean()) * torch.eye(len(g)) for g in found]

    def _store(self, editor: Editor, site: WeightSite, problem: Problem, fit: Fit, facts: dict[str, float]) -> SiteResult:
        """Pack the codes, and what the kept weights lack."""
        lut = problem.fmt
        payload = lut.pack(fit.codes, fit.table, fit.scale)
        fmt = self.planned_format(site)
        if isinstance(fmt, Composite):
            sparse = SparseOutliers(count=int(problem.kept.sum()))
            rest = problem.matrix - fit.values.gather(1, fit.codes.long())
            payload = fmt.join([payload, sparse.pack(problem.kept, rest)])
        why = f"{lut.entries} table entries, {self.sensitivity.value} sensitivity" + (", refined by LNQ" if self.refine is Refine.LNQ else "")
        return self.write(editor, site, problem.matrix, fmt, payload, facts, why)
