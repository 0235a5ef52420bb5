"""Costs of widths: what slices really take."""

from __future__ import annotations

import pytest

import fxpress
from fxpress.ir.axes import analyze_axes
from fxpress.ir.errors import PassError
from fxpress.ir.structure import Role, find_structure
from fxpress.passes.context import Context
from fxpress.passes.nesting.width_costs import Unit, width_costs
from fxpress.passes.structured.groups import find_groups

from .nets import nested


def test_bytes_and_arithmetic_are_those_of_the_slice() -> None:
    program, ctx = nested("llama")
    groups = find_groups(program, find_structure(program), (Role.FFN,))
    widths = {g: [g.size, 40] for g in groups}
    small = fxpress.optimize(program, "slice{widths=[40]}").program
    for unit, now in ((Unit.BYTES, small.nbytes), (Unit.MACS, analyze_axes(small).macs())):
        total, costs = width_costs(program, widths, unit, ctx)
        saved = sum(c[0] - c[1] for c in costs.values())
        assert total - saved == pytest.approx(now, rel=0.01)  # the centre goes, a bias may come


def test_seconds_are_looked_up_layer_by_layer() -> None:
    program, ctx = nested("llama")
    structure = find_structure(program)
    widths = {g: [g.size, 8] for g in find_groups(program, structure, (Role.FFN,))}
    total, costs = width_costs(program, widths, Unit.LATENCY, ctx)
    assert total > 0 and all(c > 0 for found in costs.values() for c in found)
    heads = {g: [g.size, 1] for g in find_groups(program, structure, (Role.KV_GROUP,))}
    with pytest.raises(PassError, match="no feed-forward layer, whose seconds could be looked up"):
        width_costs(program, heads, Unit.LATENCY, Context())
