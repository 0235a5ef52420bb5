"""The table of choices: what is fixed, what a network's item holds, every unit."""

from __future__ import annotations

import pytest

from fxpress.ir.axes import analyze_axes
from fxpress.passes.plan_factorization import PlanFactorization
from fxpress.passes.planning.choices import Kind, Unit

from .nets import two_layers


@pytest.mark.parametrize("unit", [Unit.BYTES, Unit.MACS])
def test_dense_options_add_up_to_the_program(unit: Unit) -> None:
    program, ctx = two_layers()
    table = PlanFactorization(budget=0.5, unit=unit)._know(program, ctx).table
    assert table.total == (program.nbytes if unit is Unit.BYTES else analyze_axes(program).macs())
    dense = [next(o for o in options if all(w.kind is Kind.DENSE for w in o.ways)) for options in table.items]
    assert table.fixed + sum(o.amount for o in dense) == table.total and table.fixed == (4 * 20 if unit is Unit.BYTES else 0)  # a bias
    assert all(o.cost == 0 for o in dense)


def test_a_network_is_one_item_with_its_widths() -> None:
    program, ctx = two_layers()
    items = PlanFactorization(budget=0.5)._know(program, ctx).table.items
    network = next(options for options in items if any(w.kind is Kind.SLICE for o in options for w in o.ways))
    slices = [o for o in network if o.ways[0].kind is Kind.SLICE]
    assert {w.place for o in network for w in o.ways} == {"enter", "mlp.up", "enter.weight[0]"} and len(items) == 2
    assert [o.amount for o in slices] == sorted(o.amount for o in slices) and [o.cost for o in slices] == sorted((o.cost for o in slices), reverse=True)
    assert all(len(o.ways) == 1 for o in slices) and len(slices) >= 10
