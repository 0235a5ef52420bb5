"""Weights and inner formats that every sparse format is tried on."""

from __future__ import annotations

import torch
from torch import Tensor

INNER = (
    "dense",
    "affine{bits=4}",
    "affine{bits=8,group_size=16,symmetric=true}",
    "affine{bits=3,group_size=32}",
    "lut{entries=16}",
    "lut{entries=5,rows_per_table=none}",
)
DENSITIES = (0.0, 0.01, 0.3, 0.5, 0.7, 0.9, 1.1)
SHAPES = ((5, 64), (8, 100), (1, 32), (33, 36))


def weight(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    """`[rows, columns] f32`, zero but for a share of about `density`."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * (torch.rand(rows, columns, generator=generator) < density)
