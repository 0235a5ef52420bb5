"""Budgets: arithmetic equals what the resized program really has; latency is measured."""

from __future__ import annotations

import pytest

from fxpress.ir.axes import analyze_axes
from fxpress.passes.structured.budgets import Budget, measure, shrunk

from .nets import groups_of, tiny_with_data


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet", "mobilenet_v2"])
def test_shares_are_those_of_the_resized_program(name: str) -> None:
    program, _ = tiny_with_data(name)
    groups = groups_of(program)
    counts = {g: max(1, g.size * 2 // 3) for g in groups}
    small = shrunk(program, counts)
    analysis = groups[0].analysis
    assert measure(program, analysis, Budget.PARAMETERS)(counts) == small.parameters / program.parameters
    assert measure(program, analysis, Budget.MACS)(counts) == analyze_axes(small).macs() / analysis.macs()


def test_latency_is_a_ratio_of_measured_times() -> None:
    program, _ = tiny_with_data("mlp")
    groups = groups_of(program)
    share = measure(program, groups[0].analysis, Budget.LATENCY)
    counts = dict.fromkeys(groups, 1)
    assert 0.05 < share(counts) < 20
    assert share(counts) == share(counts)  # measured once
