"""Wanda: remove the weights of smallest |weight| times input norm, compared within each output row.

Source: Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024 (arXiv 2306.11695), equation 1:
`S_ij = |W_ij| * ||X_j||_2`, comparison group = one output row. Inputs come from the model as pruned so far (`sequential`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ..ir.sites import WeightSite
from .base import Decision, Need
from .calibrate import Statistics, why_not_observable
from .masks import lowest_of_all, lowest_of_pattern, lowest_per_row, parse_pattern
from .pruning import MaskPruning


class WandaScope(Enum):
    """Over what the fraction is counted: every output row (published), or the whole matrix."""

    ROW = "row"
    LAYER = "layer"


@dataclass(frozen=True, kw_only=True)
class PruneWanda(MaskPruning):
    """`weight: [N, K]` with mean square inputs `[G, K]`; unstructured per row or per matrix, or `pattern` N:M. Needs calibration data."""

    scope: WandaScope = WandaScope.ROW
    sequential: bool = True

    @property
    def needs(self) -> Need:
        """Mean square of every input column."""
        return Need.MEAN_SQUARE

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites pruned."""
        return self.sequential

    def why_not(self, site: WeightSite) -> str | None:
        """As for all pruning; convolutions also need explicit padding to be observed."""
        return super().why_not(site) or why_not_observable(site)

    def mask(self, site: WeightSite, matrix: Tensor, decision: Decision, statistics: Statistics | None) -> Tensor:
        """`[N, K] bool`, True where removed."""
        assert statistics is not None and statistics.mean_square is not None
        norms = statistics.mean_square.sqrt().repeat_interleave(site.rows // site.groups, 0)
        score = matrix.abs().float() * norms
        if self.pattern:
            return lowest_of_pattern(score, *parse_pattern(self.pattern))
        if self.scope is WandaScope.LAYER:
            return lowest_of_all(score, round(self.fraction * site.parameters))
        return lowest_per_row(score, round(self.fraction * site.columns))
