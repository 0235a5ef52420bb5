"""Mix'n'Match (MatFormer, arXiv 2310.07707, section 3.3): models between two neighbouring widths, the wider one in the last layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch


def mixes(layers: Sequence[Sequence[int]], count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Widths of every layer, `count` different choices at most: `layers` has each layer's rising widths, as many for all."""
    every = [
        tuple(sizes[place + (depth >= len(layers) - wide)] for depth, sizes in enumerate(layers))
        for place, _ in pairwise(range(len(layers[0])))
        for wide in range(1, len(layers))
    ]
    chosen = torch.randperm(len(every), generator=generator, device="cpu")[:count].tolist()
    return [every[i] for i in sorted(chosen)]
