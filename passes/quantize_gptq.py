"""GPTQ: quantize column by column and let the columns not yet quantized absorb the error.

Source: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers", ICLR 2023 (arXiv 2210.17323), algorithm 1:
minimise `||W X - Q X||^2` with `H = X X^T` (mean over tokens here), damped by `damping * mean(diag H)`. With `act_order` the columns of largest
`diag H` go first; group ranges are then fixed beforehand from the original columns ("static groups"), so the stored groups stay contiguous and no
permutation is stored. Weights that are exactly zero on entry stay exactly zero (their rounding error is compensated like any other).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.formats.affine import Affine, Granularity
from ..ir.sites import WeightSite
from ..ir.spec import option
from .base import Decision, Guarantee, Need, SiteResult
from .calibrate import Statistics, why_not_observable
from .column_solver import ColumnSolver, row_slices, shared_solver
from .column_solver import factor as factor
from .context import Context
from .quantizing import AffineQuantization
from .ranges import RangeSearch, find_range
from .relative import relative_error

BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(AffineQuantization):
    """Affine codes of `weight: [N, K]` under the input Gram `[K, K]`. Needs calibration data; embeddings are skipped (they see indices)."""

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    search: RangeSearch = RangeSearch.MSE
    damping: float = option(0.01, gt=0.0)
    act_order: bool = True
    sequential: bool = True

    @property
    def needs(self) -> Need:
        """The input Gram."""
        return Need.GRAM

    @property
    def sees_edits(self) -> bool:
        """Sequential runs see earlier sites quantized."""
        return self.sequential

    def why_not(self, site: WeightSite) -> str | None:
        """As for all affine passes; the site's rows must be observable."""
        return why_not_observable(site) or super().why_not(site)

    def flops(self, site: WeightSite) -> float:
        """Adds the cost of the column loop and the factorization."""
        return super().flops(site) + 2.0 * site.rows * site.columns**2 + 2.0 * site.columns**3

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Quantize slices of rows, each under the Gram of its conv group (a linear has one group)."""
        assert statistics is not None and statistics.gram is not None
        matrix, fmt = site.matrix().float(), self.format_at(site)
        whole = find_range(fmt, matrix, self.search) if fmt.sharing is Granularity.TENSOR else None
        codes: list[Tensor] = []
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        error = power = 0.0
        for group, rows in row_slices(site):
            gram, part = statistics.gram[group], matrix[rows]
            scale, zero = whole or find_range(fmt, part, self.search, gram.diagonal().unsqueeze(0))
            q, scale, zero = self._columns(fmt, part, self._solver(statistics, group, site), scale, zero)
            delta = fmt.dequantize(q, scale, zero) - part
            error, power = error + float(((delta @ gram) * delta).sum()), power + float(((part @ gram) * part).sum())
            codes, scales, zeros = [*codes, q], [*scales, scale], [*zeros, zero]
        scale, zero = whole or (torch.cat(scales), torch.cat(zeros))
        facts = {"output_error": relative_error(error, power), "tokens": float(statistics.tokens)}
        return self.write(editor, site, matrix, fmt, fmt.pack(torch.cat(codes), scale, zero), facts, f"GPTQ under {statistics.tokens:,} calibration rows")

    def _solver(self, statistics: Statistics, group: int, site: WeightSite) -> ColumnSolver:
        return shared_solver(statistics, group, damping=self.damping, act_order=self.act_order, where=f"{self.name} at {site}")

    def _columns(self, fmt: Affine, matrix: Tensor, solver: ColumnSolver, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[N, K]` with the scales and zero points finally used (refreshed per group when columns go in storage order)."""
        order, upper = solver.order, solver.upper
        static = self.act_order or fmt.sharing is not Granularity.GROUP
        weights = matrix[:, order].t().contiguous()  # [K, N]: a column of the weight is a contiguous row here
        removed = weights == 0
        codes = torch.empty_like(weights, dtype=torch.uint8)
        width = fmt.group_width(matrix.shape[1])
        group_of = order // width
        scale, zero = scale.clone(), zero.clone()
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            errors = torch.empty(stop - start, matrix.shape[0])
            for i in range(start, stop):
                g, done = int(group_of[i]), errors[: i - start]
                if not static and i % width == 0:
                    ahead = weights[i : i + width] - upper[start:i, i : i + width].t() @ done
                    scale[:, g : g + 1], zero[:, g : g + 1] = find_range(fmt, ahead.t().contiguous(), self.search)
                column = torch.addmv(weights[i], done.t(), upper[start:i, i], alpha=-1.0)  # what this block's earlier columns push onto it
                codes[i], errors[i - start] = _quantize_column(fmt, column, removed[i], scale[:, g], zero[:, g], float(upper[i, i]))
            weights[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
        out = torch.empty_like(codes)
        out[order] = codes
        return out.t().contiguous(), scale, zero


def _quantize_column(fmt: Affine, column: Tensor, removed: Tensor, scale: Tensor, zero: Tensor, pivot: float) -> tuple[Tensor, Tensor]:
    """Codes and scaled error of one column `[N]`; removed weights take the code of zero."""
    code = (column / scale).add_(zero).round_().clamp_(0, fmt.levels - 1)
    if fmt.bits > 1 or not fmt.symmetric:
        code = torch.where(removed, zero.expand_as(code), code)
    return code.to(torch.uint8), (column - (code - zero) * scale).div_(pivot)
