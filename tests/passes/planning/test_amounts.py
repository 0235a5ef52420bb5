"""Amounts as counted on edited programs; times under a fake machine."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.axes import analyze_axes
from fxpress.ir.edit import Editor
from fxpress.passes.planning.amounts import chain_bytes, chain_macs, dense_chain, filled_chain, input_shape, key, met, seconds, site_macs
from fxpress.passes.planning.candidates import Space, candidates
from fxpress.passes.planning.choices import Kind

from ...tiny import fresh_program
from .nets import structured_linears


@pytest.mark.parametrize("name", ["conv", "conv1d", "mlp"])
def test_chains_take_what_the_edited_program_takes(name: str) -> None:
    program = fresh_program(name)
    analysis = analyze_axes(program)
    for site in program.sites():
        found = candidates(site, Space(kinds=frozenset(Kind), steps=4))
        if not found:
            continue
        assert chain_macs(dense_chain(site), site) == site_macs(analysis, site)
        for c in found[:: max(1, len(found) // 2)]:
            edited = program.clone()
            own = next(s for s in edited.sites() if s.name == site.name)
            chain = c.one.planned_chain(own)
            assert not isinstance(chain, str)
            with Editor(edited, "test") as editor:
                editor.factorize(own, filled_chain(chain, own.dtype), "test")
            assert analyze_axes(edited).macs() - analysis.macs() == chain_macs(chain, site) - site_macs(analysis, site), f"{site} {c.one.to_spec()}"
            assert edited.nbytes - program.nbytes == chain_bytes(chain, site) - site.nbytes


def test_equal_jobs_are_timed_once_and_remembered() -> None:
    program, ctx = structured_linears()
    sites = program.sites()
    jobs = {s.name: [(dense_chain(s), input_shape(s), s.dtype), (dense_chain(s, rows=8), input_shape(s), s.dtype)] for s in sites}
    assert len({key(j) for mine in jobs.values() for j in mine}) == 2
    found = seconds(program, jobs, ctx)
    assert torch.equal(found["0"], found["2"]) and float(found["program"]) > 0 and bool((found["0"] > 0).all())
    assert seconds(program, jobs, ctx)["0"] is found["0"]


@pytest.mark.parametrize("bias", [0.7, 1.0, 1.4])
def test_an_aim_is_found_that_meets_the_budget_in_the_whole_program(bias: float) -> None:
    def measured(aim: float) -> float:
        return min(1.0, bias * aim) + 0.02

    aim = met(measured, 0.5, 0.1)
    assert 0.9 * 0.5 < measured(aim) <= 0.5
    assert met(lambda aim: 0.9, 0.5, 0.1) <= 0.5  # out of reach: as near as it gets
