"""LNQ: least-squares tables and coordinate descent on codes, in turns, under a (guided) Gram. The error never rises.

Source: Kim et al., "GuidedQuant", ICML 2025 (arXiv 2505.07004), section 4 and algorithm 2: for every row minimise `(q - w) H (q - w)^T` over the table, in
closed form `c = (P^T H P)^-1 P^T H w`, and over one code after another, `q_i` the entry nearest to `q_i - ((q - w) H)_i / H_ii`. Ours: rows may
share a table, positions may be kept apart, an entry may be pinned at zero, and a weight's row of `H` is only touched when its code changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..threads import over_slices
from .segments import Array, compiled

RIDGE = 1e-7  # of the mean diagonal, added to the normal equations (as published)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows `matrix: [N, K] f32` under one Gram `[K, K] f32`; `frozen: [N, K] bool` weights keep their codes and cause no error."""

    matrix: Tensor
    gram: Tensor
    frozen: Tensor
    threads: int = 1

    def error(self, codes: Tensor, values: Tensor) -> Tensor:
        """`(q - w) H (q - w)^T` of every row, `[N] f64`."""
        delta = self._delta(codes, values)
        return ((delta @ self.gram).double() * delta.double()).sum(1)

    def _delta(self, codes: Tensor, values: Tensor) -> Tensor:
        return (values.gather(1, codes.long()) - self.matrix).masked_fill_(self.frozen, 0.0)

    def descend(self, codes: Tensor, values: Tensor, cycles: int) -> Tensor:
        """Codes `[N, K] uint8` after `cycles` of coordinate descent over the ascending `values: [N, E]`."""
        out = codes.cpu().clone()
        residual = self._delta(codes, values) @ self.gram
        arrays = [t.cpu().contiguous().numpy() for t in (out, values, residual, self.frozen, self.gram)]
        self._each(lambda r: _descend(arrays[0][r], arrays[1][r], arrays[2][r], arrays[3][r], arrays[4], cycles))
        return out.to(codes.device)

    def normal_equations(self, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        """`P^T H P: [N, E, E]` and `P^T H w: [N, E]`, both f64, of the weights that are not frozen."""
        left = torch.zeros(len(codes), entries, entries, dtype=torch.float64, device="cpu")
        right = torch.zeros(len(codes), entries, dtype=torch.float64, device="cpu")
        arrays = [t.cpu().contiguous().numpy() for t in (codes, self.matrix, self.frozen, left, right, self.gram)]
        self._each(lambda r: _normal(arrays[0][r], arrays[1][r], arrays[2][r], arrays[3][r], arrays[4][r], arrays[5]))
        return left.to(codes.device), right.to(codes.device)

    def _each(self, work: Callable[[slice], None]) -> None:
        over_slices(work, len(self.matrix), max(1, -(-len(self.matrix) // (4 * self.threads))), self.threads)


def solve_tables(left: Tensor, right: Tensor, tables: Tensor, pinned: Tensor) -> Tensor:
    """Least-squares tables `[T, E] f32` from `left: [T, E, E]`, `right: [T, E]`; unused and `pinned: [T, E] bool` entries stay as in `tables`."""
    diagonal = left.diagonal(dim1=1, dim2=2)
    fixed = pinned | (diagonal <= 1e-12 * diagonal.amax(1, keepdim=True).clamp_min(1e-300))
    known = torch.where(fixed, tables.double(), 0.0)
    right = torch.where(fixed, known, right - (left @ known.unsqueeze(2)).squeeze(2))
    left = left.masked_fill(fixed.unsqueeze(1) | fixed.unsqueeze(2), 0.0)
    mean = diagonal.mean(1, keepdim=True).clamp_min(1e-300)
    left = left + torch.diag_embed(torch.where(fixed, 1.0, RIDGE * mean))
    solved = torch.linalg.solve(left, torch.where(fixed, right, right + RIDGE * mean * tables.double()))
    return torch.where(torch.isfinite(solved).all(1, keepdim=True), solved, tables.double()).float()


@compiled
def _descend(codes: Array, values: Array, residual: Array, frozen: Array, gram: Array, cycles: int) -> None:
    """`residual: [N, K]` is `(q - w) H`; rows do not depend on each other."""
    last = values.shape[1] - 1
    for n in range(len(codes)):
        table, slope = values[n], residual[n]
        for _ in range(cycles):
            changed = False
            for i in range(len(gram)):
                if frozen[n, i] or gram[i, i] <= 0:
                    continue
                old = codes[n, i]
                wanted = table[old] - slope[i] / gram[i, i]
                new = old
                while new < last and 2 * wanted > table[new] + table[new + 1]:
                    new += 1
                while new > 0 and 2 * wanted < table[new] + table[new - 1]:
                    new -= 1
                if new != old:
                    changed = True
                    codes[n, i] = new
                    step, line = table[new] - table[old], gram[i]
                    for j in range(len(line)):
                        slope[j] += step * line[j]
            if not changed:
                break


@compiled
def _normal(codes: Array, matrix: Array, frozen: Array, left: Array, right: Array, gram: Array) -> None:
    """Sum the rows of the Gram by code, then the columns of the sums by code."""
    entries, columns = left.shape[1], len(gram)
    sums = np.zeros((entries, columns), np.float32)
    for n in range(len(codes)):
        sums[:] = 0
        for i in range(columns):
            if not frozen[n, i]:
                target, line = sums[codes[n, i]], gram[i]
                for j in range(columns):
                    target[j] += line[j]
        for e in range(entries):
            for j in range(columns):
                if not frozen[n, j]:
                    left[n, e, codes[n, j]] += sums[e, j]
                    right[n, e] += sums[e, j] * matrix[n, j]
