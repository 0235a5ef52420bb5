"""Wanda against its formula, N:M, determinism, and against magnitude on inputs of uneven size."""

from __future__ import annotations

import torch

from fxpress.ir.program import Program
from fxpress.passes.calibrate import CalibrationWalk
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.prune_magnitude import PruneMagnitude
from fxpress.passes.prune_wanda import PruneWanda, WandaScope

from .nets import conv_net, output_error


def test_mask_follows_the_published_score() -> None:
    program, ctx = conv_net()
    outcome = run_pipeline(program, [PruneWanda(sparsity=0.5, only=("hidden",))], ctx)
    hidden = next(s for s in program.sites() if s.name == "hidden")
    pruned = next(s for s in outcome.program.sites() if s.name == "hidden").matrix()
    assert ((pruned == 0).sum(1) == hidden.columns // 2).all()
    x = _inputs_of(program, ctx, "hidden").double()
    score = hidden.matrix().double().abs() * x.norm(dim=0)
    removed = pruned == 0
    assert (score.masked_fill(~removed, 0).amax(1) <= score.masked_fill(removed, float("inf")).amin(1) * (1 + 1e-5)).all()


def _inputs_of(program: Program, ctx: Context, name: str) -> torch.Tensor:
    walk = CalibrationWalk(program, ctx.calibration)
    site = next(s for s in program.sites() if s.name == name)
    walk.run_before(site.node)
    return torch.cat([v[site.data] for v in walk._values])


def test_beats_magnitude_on_uneven_inputs() -> None:
    program, ctx = conv_net()
    wanda = run_pipeline(program, [PruneWanda(sparsity=0.5)], ctx).program
    magnitude = run_pipeline(program, [PruneMagnitude(sparsity=0.5)], ctx).program
    assert output_error(program, wanda, ctx) < output_error(program, magnitude, ctx)


def test_patterns_scopes_and_sequential_modes_are_deterministic() -> None:
    program, ctx = conv_net()
    for one in (PruneWanda(pattern="4:8", only=("h*",)), PruneWanda(sparsity=0.3, scope=WandaScope.LAYER), PruneWanda(sparsity=0.3, sequential=False)):
        first, second = (run_pipeline(program, [one], ctx).program for _ in range(2))
        assert all(torch.equal(a.matrix(), b.matrix()) for a, b in zip(first.sites(), second.sites(), strict=True))


def test_sequential_mode_sees_pruned_inputs() -> None:
    program, ctx = conv_net()
    on, off = (run_pipeline(program, [PruneWanda(sparsity=0.6, sequential=s)], ctx).program for s in (True, False))
    assert torch.equal(on.sites()[0].matrix(), off.sites()[0].matrix())
    assert not all(torch.equal(a.matrix(), b.matrix()) for a, b in zip(on.sites(), off.sites(), strict=True))
