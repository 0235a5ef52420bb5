"""How a product is cut into programs: tokens each, splits along K."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .layout import Packed

TOKEN_TILES = (8, 16, 32, 64)  # 8 serve a batch of one too: a form without tensor cores takes 0.9 to 2.4 more instructions a weight (docs/triton.md)
HOPPER = 9  # major compute capability
WAVES = 8  # programs for every multiprocessor that are wanted: on an H100 more splits than it takes to fill it once were faster
MOST_SPLITS = 8
LEAST_TURNS = 4  # tiles along K below which a split only adds partial sums
_MULTIPROCESSORS = 108  # where there is no GPU to ask


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Tokens a program, splits along K, warps, pipeline stages."""

    tokens: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 3


def schedule_for(packed: Packed, tokens: int, multiprocessors: int | None = None) -> Schedule:
    """The narrowest tile of tokens that holds all (64 at most), and as many splits along K as it takes to fill the GPU.

    `multiprocessors`: of the GPU that holds the weight unless given. On Hopper 16 tokens at least: a tile of 8 misses its matrix instruction.
    """
    tiles = TOKEN_TILES[1:] if hopper(packed.values.device) else TOKEN_TILES
    wide = next((t for t in tiles if t >= tokens), tiles[-1])
    programs = -(-packed.rows // packed.tile.rows) * -(-tokens // wide)
    wanted = -(-WAVES * (multiprocessors or _multiprocessors(packed.values.device)) // programs)
    return Schedule(tokens=wide, splits=max(1, min(wanted, MOST_SPLITS, packed.tiles // LEAST_TURNS)))


@cache
def hopper(device: torch.device) -> bool:
    """Whether the matrix instruction of `device` is Hopper's."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else _MULTIPROCESSORS
