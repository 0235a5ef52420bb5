"""Time several callables against each other in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from ..ir.errors import CalibrationError
from .measurement import Measurement


@dataclass(frozen=True)
class Spread:
    """Median, first and third quartile of one quantity over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Spread of one value or more."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return Spread(median(values), low, high)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One callable: seconds a call, and its time over the first callable's in the same round (`ratio` below 1: faster than the first)."""

    name: str
    seconds: Spread
    ratio: Spread


@dataclass(frozen=True, kw_only=True)
class Latency(Measurement):
    """Timings in the order the callables were given; the first is the baseline."""

    rounds: int
    timings: tuple[Timing, ...]

    def __getitem__(self, name: str) -> Timing:
        return next(t for t in self.timings if t.name == name)


def latency(
    callables: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Median seconds of each callable and ratios to the first, from `rounds` rounds in which all of them run once, in turn.

    A machine that slows down slows all of them, so ratios are taken within a round; who goes first changes from round to round. `warmup` rounds are not
    counted. `synchronize` (on a GPU: `torch.cuda.synchronize`) is called before the clock is read.
    """
    if not callables or rounds < 1:
        raise CalibrationError(f"latency: expected at least one callable and one round, got {len(callables)} and {rounds}")
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = _time(callables[name], synchronize, clock)
            if number >= 0:
                seconds[name].append(taken)
    return Latency(rounds=rounds, timings=tuple(_timing(name, seconds[name], seconds[names[0]]) for name in names))


def _time(call: Callable[[], Any], synchronize: Callable[[], Any] | None, clock: Callable[[], float]) -> float:
    if synchronize:
        synchronize()
    began = clock()
    call()
    if synchronize:
        synchronize()
    return clock() - began


def _timing(name: str, own: list[float], baseline: list[float]) -> Timing:
    ratios = [a / b if b else float("inf") for a, b in zip(own, baseline, strict=True)]
    return Timing(name=name, seconds=Spread.of(own), ratio=Spread.of(ratios))
