"""How many weights go, and where they may: unstructured over a whole matrix, or balanced N:M, for methods that choose a mask piece by piece.

Some weights cost nothing to remove, and go first: those that are zero already, and those in columns that no data ever reached.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import lowest_of_all, lowest_of_pattern, lowest_per_row, parse_pattern

INF = float("inf")
WORTHLESS = 1e-20  # factor on the scores of columns that no data reached: among themselves, smaller weights still go first


@dataclass(frozen=True)
class Removal(ABC):
    """Masks (True where removed) from non-negative scores. `free: [N, K] bool` is removed whatever its score; `width` columns are chosen at a time."""

    free: Tensor
    width: int

    @abstractmethod
    def of_columns(self, score: Tensor, start: int) -> Tensor:
        """`[n, N] bool` for the n <= `width` columns from `start` on (a multiple of `width`); `score: [n, N] f32`, columns first."""

    @abstractmethod
    def of_matrix(self, score: Tensor) -> Tensor:
        """`[N, K] bool` for all columns at once; `score: [N, K] f32`."""


@dataclass(frozen=True)
class Unstructured(Removal):
    """`counts` weights go in each piece of `width` columns, over all rows, besides the free ones."""

    counts: Sequence[int]

    def of_columns(self, score: Tensor, start: int) -> Tensor:
        """The piece's count of its lowest scores."""
        free = self.free[:, start : start + self.width].t()
        return lowest_of_all(score.masked_fill(free, INF), self.counts[start // self.width]) | free

    def of_matrix(self, score: Tensor) -> Tensor:
        """The lowest scores of the whole matrix, as many as the pieces add up to."""
        return lowest_of_all(score.masked_fill(self.free, INF), sum(self.counts)) | self.free


@dataclass(frozen=True)
class Balanced(Removal):
    """`keep` of every `width` columns stay in each row; `worth: [K] f32` scales scores by column."""

    keep: int
    worth: Tensor

    def of_columns(self, score: Tensor, start: int) -> Tensor:
        """The lowest scores of each row in one group of columns."""
        columns = slice(start, start + self.width)
        free = self.free[:, columns]
        score = (score.t() * self.worth[columns]).masked_fill(free, -1.0)
        return (lowest_per_row(score, self.width - self.keep) | free).t()

    def of_matrix(self, score: Tensor) -> Tensor:
        """The lowest scores of every group of every row."""
        return lowest_of_pattern((score * self.worth).masked_fill(self.free, -1.0), self.keep, self.width) | self.free


def unstructured(matrix: Tensor, dead: Tensor, count: int, width: int) -> Unstructured:
    """Remove `count` weights of `matrix: [N, K] f32` in all; what is not free is spread evenly over the weights that are left, to rounding.

    `dead: [K] bool` are columns no data reached. More zeros than `count` all stay.
    """
    zero = matrix == 0
    idle = zero | dead
    first = min(count, int(idle.sum()))
    free = lowest_of_all(matrix.abs().masked_fill(~idle, INF), first) | zero
    live = (~free).sum(0).cumsum(0)[[*range(width - 1, matrix.shape[1] - 1, width), -1]].tolist()
    left = max(0, count - int(free.sum()))
    ends = [round(left * n / max(live[-1], 1)) for n in live]
    return Unstructured(free, width, [b - a for a, b in zip([0, *ends], ends, strict=False)])


def balanced(matrix: Tensor, dead: Tensor, pattern: str) -> Balanced:
    """Keep N of every M columns of `matrix: [N, K] f32` (K divisible by M) in each row; `dead: [K] bool` are columns no data reached."""
    keep, group = parse_pattern(pattern)
    return Balanced(matrix == 0, group, keep, torch.where(dead, WORTHLESS, 1.0))
