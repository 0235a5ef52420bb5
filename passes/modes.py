"""How a dimension is written as a product of modes, padded with zeros where its primes do not allow it."""

from __future__ import annotations

from math import prod


def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    """`count` modes of about equal size whose product is `size` or, when its primes do not split evenly, the least larger number whose primes do.

    Prime factors, the largest first, go into the smallest mode so far; a mode may be at most twice the even share, `size ** (1 / count)`.
    """
    padded = size
    while True:
        modes = _deal(padded, count)
        if max(modes) <= 2 * padded ** (1 / count) or padded >= 2 * size:
            return modes
        padded += 1


def padding(size: int, modes: tuple[int, ...]) -> int:
    """Zeros behind `size` that fill the modes."""
    return prod(modes) - size


def _deal(size: int, count: int) -> tuple[int, ...]:
    modes = [1] * count
    for prime in sorted(prime_factors(size), reverse=True):
        modes[modes.index(min(modes))] *= prime
    return tuple(sorted(modes))


def prime_factors(size: int) -> list[int]:
    """Prime factors with repetition, rising."""
    found, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1
    return [*found, size] if size > 1 else found
