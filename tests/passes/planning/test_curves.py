"""Error curves: falling, on one scale, remembered, and honest about what is not tried."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import torch

from fxpress.passes.base import Need
from fxpress.passes.calibrate import CalibrationWalk
from fxpress.passes.factorize_mpo import FactorizeMpo
from fxpress.passes.memory import Memory
from fxpress.passes.planning.candidates import Space, candidates
from fxpress.passes.planning.choices import Kind
from fxpress.passes.planning.curves import error_curves, seen_by
from fxpress.passes.planning.networks import find_networks
from fxpress.passes.structured.amounts import Limits
from fxpress.passes.structured.scores import Importance, score_groups

from .nets import structured_linears, two_layers


def test_curves_fall_and_are_made_once() -> None:
    program, ctx = structured_linears()
    tried = {s.name: candidates(s, Space(kinds=frozenset({Kind.SVD}))) for s in program.sites()}
    ctx = replace(ctx, memory=Memory())
    found = error_curves(program, tried, [], True, ctx)
    for name, costs in found.costs.items():
        assert len(costs) == len(tried[name]) and bool((costs.diff() <= 1e-12).all()) and bool((found.errors[name] <= 1).all())
    assert all(a is found.costs[n] for n, a in error_curves(program, tried, [], True, ctx).costs.items())
    plain = error_curves(program, tried, [], False, ctx)
    assert all(torch.allclose(c, plain.errors[n].square(), rtol=1e-6) for n, c in plain.costs.items()) and not plain.sensitivity


def test_members_that_lose_at_one_bond_are_not_tried_at_others() -> None:
    program, ctx = structured_linears()
    tried = {s.name: candidates(s, Space(kinds=frozenset({Kind.SVD, Kind.MPO}))) for s in program.sites()}
    found = error_curves(program, tried, [], False, replace(ctx, memory=Memory()))
    known = {
        name: [c.one.family for c, cost in zip(tried[name], found.costs[name], strict=True) if isinstance(c.one, FactorizeMpo) and cost < inf] for name in tried
    }
    assert known["0"].count(2) == 5 and known["2"] == [2, 4]  # all bonds where the structure is there, one of each member for a low-rank weight


def test_scores_of_hidden_units_are_those_of_structured_pruning() -> None:
    program, ctx = two_layers()
    networks, _ = find_networks(program, Limits(), (0.5,))
    scores = error_curves(program, {}, networks, True, replace(ctx, memory=Memory())).scores
    expected = score_groups(program, [n.group for n in networks], Importance.OBS_FISHER, replace(ctx, memory=Memory()))
    assert {n.name: scores[n.name].tolist() for n in networks} == {g.name: s.tolist() for g, s in expected.items()}


def test_wide_grams_are_not_lent() -> None:
    program, ctx = structured_linears()
    site = program.sites()[0]
    statistics = CalibrationWalk(program, ctx.calibration).statistics([site], Need.GRAM)
    assert seen_by(FactorizeMpo(chi=2), site, statistics) is statistics
