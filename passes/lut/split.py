"""Which weights a dense-and-sparse split keeps apart: the most sensitive ones first, then the largest of the rest.

Source: Kim et al., "SqueezeLLM" (arXiv 2306.07629), section 4.2, and the order of its released code. There outliers lie beyond a threshold
`max(|q1 - r IQR|, |q3 + r IQR|)` whose `r` is tuned by hand to the wanted share; taking the largest magnitudes of the matrix is the same with `r` solved for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept_count(parameters: int, sensitive: float, outliers: float) -> int:
    """How many of `parameters` weights are kept apart."""
    return int(parameters * sensitive) + int(parameters * outliers)


def kept_apart(matrix: Tensor, weights: Tensor | None, sensitive: float, outliers: float) -> Tensor:
    """Mask `[N, K] bool` of `int(N K sensitive)` weights of largest sensitivity `weights: [N, K]`, and `int(N K outliers)` of largest magnitude of the rest."""
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    for share, score in ((sensitive, weights), (outliers, matrix.abs())):
        count = int(matrix.numel() * share)
        if count and score is not None:
            ranked = score.expand(matrix.shape).masked_fill(mask, -1.0).flatten()
            mask.view(-1)[ranked.topk(count).indices] = True
    return mask
