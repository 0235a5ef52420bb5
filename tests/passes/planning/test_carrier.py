"""The internal pass that gives every site its own factorization."""

from __future__ import annotations

import torch

from fxpress.passes.base import Need, Plan
from fxpress.passes.factorize_mpo import FactorizeMpo
from fxpress.passes.factorize_svd import FactorizeSvd, Metric
from fxpress.passes.planning.carrier import Carrier
from fxpress.passes.stage import run_stage

from ...tiny import randn
from .nets import structured_linears


def test_every_site_gets_its_own_under_one_walk() -> None:
    program, ctx = structured_linears()
    done = program.clone()
    sensitivity = {"2": randn(32).square()}
    chosen = {"0": FactorizeMpo(chi=5, family=2), "2": FactorizeSvd(rank=3, metric=Metric.BOTH)}
    carrier = Carrier(plan="planner{budget=0.5}", chosen=chosen, sensitivity=sensitivity)
    decisions = tuple(carrier.decide(s, ctx) for s in done.sites() if carrier.why_not(s) is None)
    results = run_stage(done, (carrier,), (Plan(pass_spec="", decisions=decisions, skips=()),), ctx).results[0]
    assert [r.site for r in results] == ["0", "2"] and carrier.needs is Need.GRAM and not hasattr(carrier, "sites")
    assert {s.name for s in done.sites()} == {"0.inner", "0.outer", "2.down", "2.up", "4"}
    assert {c.pass_spec for c in done.journal.changes} == {"planner{budget=0.5}"}
    up = next(s for s in done.sites() if s.name == "2.up").matrix().double()
    weighted = sensitivity["2"].double().sqrt().unsqueeze(1) * up  # orthogonal columns under the weights that were planned with
    gram = weighted.t() @ weighted
    assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-4 * float(gram.diagonal().max()))
