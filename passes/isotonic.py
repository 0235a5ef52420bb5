"""Monotone least squares by pooling adjacent violators (Ayer et al., Ann. Math. Statist. 1955)."""

from __future__ import annotations

from collections.abc import Sequence


def falling(values: Sequence[float]) -> list[float]:
    """The closest sequence, in squares, that never rises."""
    pools: list[tuple[float, int]] = []  # mean and length
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, count in pools for _ in range(count)]
