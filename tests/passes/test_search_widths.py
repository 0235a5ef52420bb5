"""Widths under a budget: met, no worse than equal shares, the same whether planned or done, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxpress
from fxpress.ir.errors import CalibrationError, PassError, SpecError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import set_tensor
from fxpress.passes.base import parse_pass
from fxpress.passes.nesting.width_costs import Unit
from fxpress.passes.search_widths import Search, SearchWidths, frontier
from fxpress.passes.slice import nested_sites

from ..tiny import fresh_program
from .nesting.nets import nested
from .test_decompose_modules import data


def uneven() -> tuple[Program, Any]:
    """A nested llama whose second layer hardly matters."""
    program, ctx = nested("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    set_tensor(program.graph_module, name, get_tensor(program.graph_module, name).detach() * 0.01, parameter=True)
    return program, ctx


@pytest.mark.parametrize("unit", ["bytes", "macs"])
def test_the_budget_is_met_and_goes_where_it_counts(unit: str) -> None:
    program, _ = uneven()
    result = fxpress.optimize(program, f"search_widths{{budget=0.85,unit={unit},levels=11}}", calibration=data("llama"))
    kept = {t.site: t.facts["kept"] for t in result.reports[0].taken}
    assert [site for site in kept if "layers.1" in site] and all("layers.1" in site or k >= 80 for site, k in kept.items())
    if unit == "bytes":
        assert 0.75 < result.program.nbytes / program.nbytes <= 0.86
    assert "loss predicted" in result.reports[0].notes[0] and "% of the program's" in result.reports[0].notes[0]


def test_exchanges_and_starts_never_make_it_worse() -> None:
    program, ctx = nested("llama")
    options = SearchWidths(budget=0.85, levels=11)
    from fxpress.ir.structure import find_structure
    from fxpress.passes.structured.groups import find_groups

    search = Search(options, program, find_groups(program, find_structure(program), options.roles), ctx)
    room = search.room(0.85)
    best = search.run(0.85)
    for places in (search.knapsack(room), search.ramp(room, 0), search.ramp(room, 1)):
        assert best.measured <= search.measured(places) and search._cost(places) <= room
    rising = list(search.ramp(room, 1).values())
    assert rising[0] >= rising[-1], "places count down from the full width"


def test_a_frontier_falls_and_says_what_equal_shares_lose() -> None:
    program, ctx = uneven()
    rows = frontier(program, (0.95, 0.85, 0.78), ctx, SearchWidths(budget=0.5, unit=Unit.BYTES, levels=11))
    measured = [float(str(row["measured"])) for row in rows]
    assert measured == sorted(measured) and all(row["measured"] <= row["equal_measured"] for row in rows)  # type: ignore[operator]
    assert all(row["share"] <= row["budget"] and len(row["widths"]) == 2 for row in rows)  # type: ignore[operator,arg-type]


def test_behind_nest_a_plan_shows_equal_shares() -> None:
    recipe = ["nest", "search_widths{budget=0.85,levels=11}"]
    run = fxpress.optimize(fresh_program("llama"), recipe, calibration=data("llama"), dry_run=True)
    counts = [d.facts["kept"] for d in run.passes[1].plan.decisions]
    assert len(counts) == 2 and abs(counts[0] - counts[1]) <= 8
    done = fxpress.optimize(fresh_program("llama"), recipe, calibration=data("llama"))
    assert done.program.nbytes < 0.87 * fresh_program("llama").nbytes and len(nested_sites(done.program)) > 2


def test_refusals() -> None:
    program, _ = nested("llama")
    with pytest.raises(PassError, match="the narrowest widths allowed take"):
        fxpress.optimize(program, "search_widths{budget=0.2}", calibration=data("llama"))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        fxpress.optimize(program, "search_widths{budget=0.9}")
    with pytest.raises(PassError, match="in no order of importance; put nest before"):
        fxpress.optimize(fresh_program("llama"), "search_widths{budget=0.9}", calibration=data("llama"))
    with pytest.raises(SpecError, match="shares must fall"):
        parse_pass("search_widths{budget=0.9,shares=[0.5,0.75]}")
    with pytest.raises(SpecError, match="shares must fall"):
        parse_pass("search_widths{budget=0.9,shares=[0.5,0.5]}")
    assert torch.is_tensor(get_tensor(program.graph_module, "model.layers.0.mlp.down_proj.weight"))
