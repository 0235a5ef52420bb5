"""Which of two cores is applied first: the one that leaves less arithmetic, or the one that measures faster on this machine. Both compute the same."""

from __future__ import annotations

import time
from enum import Enum
from functools import cache
from statistics import median

import torch

from ..ir.chain import Chain, run
from .kronecker_sum import Cores, as_chain

ROUNDS = 7


class Order(Enum):
    """How the order is chosen."""

    ARITHMETIC = "arithmetic"  # the same on every machine
    MEASURED = "measured"  # the faster one here, at the tokens of the example inputs


def faster_first(cores: Cores, tokens: int, dtype: torch.dtype) -> bool:
    """Whether the second core should come first, by the median of alternating runs of both chains over `tokens` rows; timed once a shape."""
    a, b, chi = cores.first.shape
    return _faster((a, b, chi), tuple(cores.second.shape), cores.rows, cores.columns, tokens, dtype)


@cache
def _faster(first: tuple[int, ...], second: tuple[int, ...], rows: int, columns: int, tokens: int, dtype: torch.dtype) -> bool:
    cores = Cores(first=torch.ones(first, dtype=dtype), second=torch.ones(second, dtype=dtype), rows=rows, columns=columns)
    chains = [as_chain(cores, order) for order in (True, False)]
    seconds: list[list[float]] = [[], []]
    x = torch.ones(tokens, columns, dtype=dtype)
    for number in range(ROUNDS + 1):
        for place in (0, 1) if number % 2 else (1, 0):
            taken = _time(chains[place], x)
            if number:  # the first round only warms up
                seconds[place].append(taken)
    return median(seconds[0]) <= median(seconds[1])


def _time(chain: Chain, x: torch.Tensor) -> float:
    began = time.perf_counter()
    with torch.no_grad():
        run(chain, x)
    return time.perf_counter() - began
