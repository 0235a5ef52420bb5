"""Which weights to remove, given a score for each: exact counts, deterministic under ties (lower column first)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..ir.errors import SpecError


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`"N:M"` (N kept of every M consecutive columns) as two ints."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise SpecError(f"pattern {pattern!r}: expected N:M with 0 < N < M, for example 2:4, or unstructured")
    return int(match[1]), int(match[2])


def lowest_per_row(score: Tensor, count: int) -> Tensor:
    """Mask `[N, K] bool` of the `count` lowest scores of every row."""
    order = score.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def lowest_of_pattern(score: Tensor, keep: int, group: int) -> Tensor:
    """Mask `[N, K] bool` that leaves the `keep` highest of every `group` consecutive columns (K divisible by `group`)."""
    blocks = score.unflatten(-1, (-1, group))
    return lowest_per_row(blocks, group - keep).flatten(-2)


def lowest_of_all(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest scores of the whole matrix."""
    threshold, ties = kth_smallest(lambda: [score], count)
    return below(score, threshold, ties)


def below(score: Tensor, threshold: float, ties: int) -> Tensor:
    """Mask of scores under `threshold`, and of the first `ties` that equal it in row-major order."""
    mask, equal = score < threshold, (score == threshold).flatten()
    return mask | (equal & (equal.cumsum(0) <= ties)).view_as(mask)


def kth_smallest(scores: Callable[[], Iterable[Tensor]], count: int) -> tuple[float, int]:
    """Exact value of the `count`-th smallest of all non-negative f32 scores, and how many that equal it are among the `count`.

    Non-negative floats sort like their bit patterns, so two histogram passes over 16 bits each find it without holding all scores at once.
    """
    if count <= 0:
        return 0.0, 0
    high, rest = _bucket(scores, count, lambda bits: bits >> 16)
    low, rest = _bucket(scores, rest, lambda bits: (bits & 0xFFFF)[(bits >> 16) == high])
    value = torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32)
    return float(value), rest


def _bucket(scores: Callable[[], Iterable[Tensor]], count: int, key: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    histogram = torch.zeros(65536, dtype=torch.int64)
    for score in scores():
        histogram += torch.bincount(key(score.float().contiguous().view(torch.int32).flatten()), minlength=65536)
    cumulative = histogram.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, count))
    return bucket, count - int(cumulative[bucket] - histogram[bucket])
