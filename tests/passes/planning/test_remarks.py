"""Sentences of the report."""

from __future__ import annotations

from fxpress.passes.base import SiteResult
from fxpress.passes.planning.choices import FrontierPoint, Unit
from fxpress.passes.planning.remarks import compared, frontier_line, kinds_line, reached_line

from ...tiny import fresh_program


def test_sentences() -> None:
    program = fresh_program("mlp")
    assert reached_line(program, program, Unit.BYTES, 0.5, 0.4).startswith(f"bytes {program.nbytes:,} -> {program.nbytes:,}: 100.0% measured, 40.0% planned")
    assert "over the budget" in reached_line(program, program, Unit.MACS, 0.5, 0.4) and "over" not in reached_line(program, program, Unit.MACS, 1.0, 1.0)
    facts = {"predicted_error": 0.2, "output_error": 0.4}
    result = SiteResult(site="a", action="", bytes_before=1, bytes_after=1, facts=facts)
    assert compared([result, result]) == "relative output errors over 2 places: 0.2000 predicted, 0.4000 measured when carried out" and "over 0" in compared([])
    assert kinds_line(["keep 3 of 5", "factorize_svd{rank=1}", "factorize_svd{rank=2}"]) == "2 x factorize_svd, 1 x narrower networks"
    assert kinds_line([]) == "everything stays dense"
    point = FrontierPoint(budget=0.5, reached=0.5, cost=0.25, kinds={})
    assert frontier_line([point], Unit.MACS) == "predicted cost by share of macs: 50.0%: 0.25 (the least in reach)"
