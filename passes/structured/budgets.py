"""What a budget counts: parameters and multiply-accumulates by arithmetic on the axes, latency by running the program at the new sizes."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch

from ...ir.axes import AxisAnalysis
from ...ir.program import Program
from .amounts import Counts, first_indices
from .groups import cut

ROUNDS = 7


class Budget(Enum):
    """The unit of a budget."""

    PARAMETERS = "parameters"
    MACS = "macs"
    LATENCY = "latency"


def measure(program: Program, analysis: AxisAnalysis, budget: Budget) -> Callable[[Counts], float]:
    """A function from counts to the fraction of the program's own parameters, multiply-accumulates or seconds."""
    if budget is Budget.LATENCY:
        return _latency_share(program)
    total = analysis.parameters() if budget is Budget.PARAMETERS else analysis.macs()

    def share(counts: Counts) -> float:
        choice = {g.axis.atom: torch.arange(k) for g, k in counts.items()}
        return (analysis.parameters(choice) if budget is Budget.PARAMETERS else analysis.macs(choice)) / total

    return share


def _latency_share(program: Program) -> Callable[[Counts], float]:
    """Median of eager runs on the example inputs, the two programs alternating in one loop."""
    from ...runtime.latency import latency

    known: dict[tuple[int, ...], float] = {}

    def share(counts: Counts) -> float:
        key = tuple(counts.values())
        if key not in known:
            small = shrunk(program, counts)
            known[key] = latency({"dense": program.run_examples, "small": small.run_examples}, rounds=ROUNDS)["small"].ratio.median
        return known[key]

    return share


def shrunk(program: Program, counts: Counts) -> Program:
    """A clone of the given sizes; which indices stay does not matter."""
    small = program.clone()
    cut(small, first_indices(counts), "preview", "measured at these sizes")
    return small
