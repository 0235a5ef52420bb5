"""Magnitude pruning: exact sparsity in every scope, the smallest weights, tied weights left alone or untied."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import PassError
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.prune_magnitude import MagnitudeScope, PruneMagnitude

from .nets import conv_net, tied_net


def test_layer_scope_removes_the_smallest_weights_of_each_matrix() -> None:
    program, ctx = conv_net()
    pruned = run_pipeline(program, [PruneMagnitude(sparsity=0.4)], ctx).program
    for before, after in zip(program.sites(), pruned.sites(), strict=True):
        w, q = before.matrix(), after.matrix()
        removed = q == 0
        assert int(removed.sum()) == round(0.4 * w.numel())
        assert torch.equal(q[~removed], w[~removed])
        assert w[removed].abs().max() <= w[~removed].abs().min()


def test_global_scope_uses_one_threshold() -> None:
    program, ctx = conv_net()
    pruned = run_pipeline(program, [PruneMagnitude(sparsity=0.5, scope=MagnitudeScope.GLOBAL)], ctx).program
    before = torch.cat([s.matrix().flatten() for s in program.sites()])
    after = torch.cat([s.matrix().flatten() for s in pruned.sites()])
    assert int((after == 0).sum()) == round(0.5 * before.numel())
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()


def test_row_scope_and_pattern() -> None:
    program, ctx = conv_net()
    rows = run_pipeline(program, [PruneMagnitude(sparsity=0.5, scope=MagnitudeScope.ROW, only=("head",))], ctx).program.sites()[-1].matrix()
    assert ((rows == 0).sum(1) == 20).all()
    outcome = run_pipeline(program, [PruneMagnitude(pattern="2:4")], ctx)
    head = outcome.program.sites()[-1].matrix()
    assert ((head.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
    assert {s.site: s.why for s in outcome.reports[0].skipped} == {
        "conv": "pattern 2:4 does not divide its 27 columns",
        "depthwise": "pattern 2:4 does not divide its 9 columns",
    }


def test_the_given_program_is_never_changed() -> None:
    program, ctx = conv_net()
    before = {k: v.clone() for k, v in program.graph_module.state_dict().items()}
    run_pipeline(program, [PruneMagnitude(sparsity=0.9)], ctx)
    assert all(torch.equal(v, program.graph_module.state_dict()[k]) for k, v in before.items())


def test_tied_head_is_skipped_or_untied() -> None:
    program, ctx = tied_net()
    outcome = run_pipeline(program, [PruneMagnitude(sparsity=0.5)], ctx)
    assert "tied to embed" in next(s.why for s in outcome.reports[0].skipped if s.site == "head")
    untied = {s.name: s for s in run_pipeline(program, [PruneMagnitude(sparsity=0.5, untie=True)], ctx).program.sites()}
    assert float((untied["head"].matrix() == 0).float().mean()) == 0.5
    assert float((untied["embed"].matrix() == 0).float().mean()) == 0.0
    assert untied["head"].tied == ()


def test_touching_nothing_is_an_error_that_lists_reasons_unless_allowed() -> None:
    program, ctx = conv_net()
    with pytest.raises(PassError, match=r"would touch nothing.*not in only"):
        run_pipeline(program, [PruneMagnitude(sparsity=0.5, only=("nothing.*",))], ctx)
    outcome = run_pipeline(program, [PruneMagnitude(sparsity=0.5, only=("nothing.*",), allow_empty=True)], ctx)
    assert outcome.reports[0].taken == ()
