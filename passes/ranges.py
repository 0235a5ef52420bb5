"""Where a quantizer's range should end: the whole span of a group, or the shrunk span of least squared error."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ..ir.formats.affine import Affine, Granularity

CHUNK_ELEMENTS = 2**18  # rows are searched in slices that stay in the processor's cache
SHRINKS = tuple(1 - i / 40 for i in range(1, 25))  # 0.975 down to 0.4


class RangeSearch(Enum):
    """How scales and zero points are found."""

    MIN_MAX = "minmax"
    MSE = "mse"


def find_range(fmt: Affine, matrix: Tensor, search: RangeSearch, column_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[N, G] f32` for `matrix: [N, K] f32`.

    With `MSE`, each group's span is shrunk by the factor of least `sum_k c_k (w_k - q(w_k))^2`; `column_weight: [N or 1, K]` is c, all ones when
    absent (the diagonal of the input Gram makes it the layer's output error to first order).
    """
    if search is RangeSearch.MIN_MAX:
        return fmt.min_max(matrix)
    if fmt.sharing is Granularity.TENSOR:
        return _search(fmt, matrix, column_weight)
    step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
    weights = None if column_weight is None else column_weight.expand(matrix.shape[0], -1)
    parts = [_search(fmt, matrix[i : i + step], None if weights is None else weights[i : i + step]) for i in range(0, matrix.shape[0], step)]
    return torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])


def _search(fmt: Affine, matrix: Tensor, column_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    groups, (low, high) = fmt.group(matrix), fmt.span(matrix)
    weights = None if column_weight is None else fmt.group(column_weight.expand(matrix.shape))
    scale, zero = fmt.grid_of(low, high)
    best = _error(fmt, groups, scale, zero, weights)
    for shrink in SHRINKS:
        candidate = fmt.grid_of(low * shrink, high * shrink)
        error = _error(fmt, groups, *candidate, weights)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, candidate[0], scale), torch.where(better, candidate[1], zero)
    return scale, zero


def _error(fmt: Affine, groups: Tensor, scale: Tensor, zero: Tensor, weights: Tensor | None) -> Tensor:
    """Squared error `[N, G]` of `groups: [N, G, g]`; codes are kept relative to the zero point, which saves two sweeps."""
    step, center = scale.unsqueeze(-1), zero.unsqueeze(-1)
    half = center.frac() if fmt.bits == 1 else 0.0  # the zero point of symmetric 1-bit codes is 0.5
    square = (groups / step).add_(half).round_().sub_(half).clamp_(-center, fmt.levels - 1 - center).mul_(step).sub_(groups).square_()
    return (square if weights is None else square.mul_(weights)).sum(-1)
