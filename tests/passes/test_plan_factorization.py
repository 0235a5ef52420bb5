"""One budget over a whole program: kept to the byte, never behind a uniform pass, the right kind for each structure, refusals, resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpress
from fxpress.ir.axes import analyze_axes
from fxpress.ir.errors import CalibrationError, PassError, SpecError
from fxpress.ir.program import Program
from fxpress.passes.base import Plan, SiteResult, parse_pass
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.memory import Memory
from fxpress.passes.pipeline import Outcome, plan_passes, run_pipeline
from fxpress.passes.plan_factorization import PlanFactorization, Weighting
from fxpress.passes.planning.choices import Kind, Unit, at_share

from ..tiny import Mlp, fresh_program, randn, tokens
from .nets import conv_net, output_error, tied_net
from .planning.nets import feed_forward, program_of, structured_convolutions, structured_linears, two_layers


def run(net: tuple[Program, Context], *passes: Any) -> Outcome:
    return run_pipeline(net[0], [parse_pass(p) for p in passes], net[1])


def taken(out: Outcome) -> dict[str, SiteResult]:
    return {t.site: t for t in out.reports[0].taken}


def kinds(out: Outcome) -> dict[str, str]:
    return {site: t.action.partition("{")[0] for site, t in taken(out).items()}


@pytest.mark.parametrize("budget", [0.85, 0.6, 0.35])
@pytest.mark.parametrize("net", [conv_net, tied_net, two_layers])
def test_the_budget_is_kept_to_the_byte_and_the_preview_knows(net: Any, budget: float) -> None:
    program, ctx = net()
    one = PlanFactorization(budget=budget, candidates=(Kind.SVD, Kind.TUCKER, Kind.SLICE))
    planned = plan_passes(program, [one], ctx)[0]
    out = run((program, ctx), one)
    assert out.program.nbytes == planned.bytes_after <= budget * program.nbytes
    saved = sum(d.bytes_before - d.bytes_after for d in planned.plan.decisions)
    assert program.nbytes - saved == out.program.nbytes == program.nbytes + sum(t.bytes_after - t.bytes_before for t in out.reports[0].taken)
    out.program.verify()
    assert bool(torch.isfinite(out.program.run_inputs(ctx.calibration[0])).all())


@pytest.mark.parametrize("weighting", list(Weighting))
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_never_behind_pairs_of_one_ratio_at_the_same_bytes(weighting: Weighting, share: float) -> None:
    program, ctx = two_layers()
    even = run((program, ctx), f"factorize_svd{{ratio={share}}}").program
    table = PlanFactorization(budget=0.5, weighting=weighting)._know(program, ctx).table
    ways = {w.place: [v for o in options for v in o.ways if v.place == w.place] for options in table.items for o in options for w in o.ways}
    uniform = sum(at_share(found, Kind.SVD, share).cost for found in ways.values() if any(w.kind is Kind.DENSE for w in found))
    best = sum(o.cost for o in table.choose(even.nbytes / program.nbytes))
    assert best <= uniform * (1 + 1e-9)
    mixed = run((program, ctx), PlanFactorization(budget=even.nbytes / program.nbytes, weighting=weighting)).program
    assert mixed.nbytes <= even.nbytes and output_error(program, mixed, ctx) < output_error(program, even, ctx)


def test_every_linear_gets_the_kind_that_suits_it() -> None:
    out = run(structured_linears(), "plan_factorization{budget=0.6}")
    assert kinds(out) == {"0": "factorize_mpo", "2": "factorize_svd"}
    assert "family=2" in taken(out)["0"].action and all(t.facts["output_error"] < 0.02 for t in out.reports[0].taken)


def test_every_convolution_gets_the_kind_that_suits_it() -> None:
    program, ctx = structured_convolutions()
    out = run((program, ctx), "plan_factorization{budget=0.16,unit=macs}")
    assert kinds(out) == {"0": "factorize_cp", "2": "factorize_tucker", "4": "factorize_svd"}
    assert analyze_axes(out.program).macs() <= 0.16 * analyze_axes(program).macs()
    assert f"-> {analyze_axes(out.program).macs():,}" in out.reports[0].notes[1]


def test_a_network_is_sliced_or_factorized() -> None:
    redundant, low = run(feed_forward(False), "plan_factorization{budget=0.45}"), run(feed_forward(True), "plan_factorization{budget=0.45}")
    assert taken(redundant)["up.weight[0]"].action.startswith("keep ") and len(taken(redundant)) == 1
    assert kinds(low) == {"up": "factorize_svd", "down": "factorize_svd"}
    for out, net in ((redundant, feed_forward(False)), (low, feed_forward(True))):
        assert output_error(net[0], out.program, net[1]) < 0.05


def test_tied_and_embedded_weights_stay_with_their_reasons() -> None:
    out = run(tied_net(), "plan_factorization{budget=0.8}")
    why = {s.site: s.why for s in out.reports[0].skipped}
    assert why["head"].startswith("its weight is tied to embed") and "looked up" in why["embed"]
    assert all(site not in kinds(out) for site in why)


def test_the_plan_is_data_that_carries_itself_out() -> None:
    program, ctx = two_layers()
    one = PlanFactorization(budget=0.5)
    plan = one.analyze(program, ctx)
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict() | {"decisions": list(plan.to_dict()["decisions"]), "skips": list(plan.to_dict()["skips"])}
    assert all(d.action.startswith("keep ") or parse_pass(d.action) for d in plan.decisions)
    done = program.clone()
    one.rewrite(done, plan, replace(ctx, remarks=[]))
    assert done.nbytes == program.nbytes - sum(d.bytes_before - d.bytes_after for d in plan.decisions)
    with pytest.raises(PassError, match="plan again"):
        one.rewrite(program.clone(), Plan(pass_spec="", decisions=(replace(plan.decisions[0], site="nowhere"),), skips=()), ctx)


def test_a_budget_below_the_floor_names_it() -> None:
    program, ctx = two_layers()
    floor = PlanFactorization(budget=0.5).frontier(program, ctx)[-1]
    with pytest.raises(PassError, match=rf"budget of 1.00% .* least in reach is {floor.budget:.2%}\. Raise the budget"):
        run((program, ctx), "plan_factorization{budget=0.01}")
    at_floor = run((program, ctx), PlanFactorization(budget=floor.budget))
    assert at_floor.program.nbytes == round(floor.budget * program.nbytes)
    with pytest.raises(PassError, match=r"would touch nothing.*stays dense"):
        run((program, ctx), "plan_factorization{budget=1.0}")


def test_the_frontier_rises_as_budgets_fall() -> None:
    program, ctx = two_layers()
    points = PlanFactorization(budget=0.5).frontier(program, ctx, (0.5, 0.9, 0.7))
    assert [p.budget for p in points][:3] == [0.9, 0.7, 0.5] and all(p.reached <= p.budget + 1e-9 for p in points)
    assert [p.cost for p in points] == sorted(p.cost for p in points) and points[0].cost < points[-1].cost
    notes = run((program, ctx), "plan_factorization{budget=0.7}").reports[0].notes
    assert "70.0%:" in notes[3] and "least in reach" in notes[3] and "allowed" in notes[1] and "predicted" in notes[2]


def test_options_restrict_what_is_tried() -> None:
    program, ctx = two_layers()
    only = run((program, ctx), "plan_factorization{budget=0.9,only=[enter]}")
    assert set(kinds(only)) == {"enter"}
    narrow = run((program, ctx), "plan_factorization{budget=0.7,candidates=[slice],multiple=4}")
    assert all(t.facts["width"] % 4 == 0 for t in narrow.reports[0].taken)
    kept = run((program, ctx), "plan_factorization{budget=0.75,min_keep=0.5}")
    assert all(t.bytes_after >= 0.45 * t.bytes_before for t in kept.reports[0].taken)
    even = run((program, ctx), "plan_factorization{budget=0.6,multiple=4,candidates=[svd]}")
    assert all(t.facts["rank"] % 4 == 0 for t in even.reports[0].taken)


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    program, ctx = two_layers()
    one = PlanFactorization(budget=0.6, candidates=(Kind.SVD,))
    whole = run_pipeline(program, [one], ctx).program
    run_pipeline(program, [one], replace(ctx, checkpoint=Checkpoint(tmp_path, "x"), memory=Memory()))
    sorted(tmp_path.glob("stage*.safetensors"))[-1].unlink()
    again = Checkpoint(tmp_path, "x")
    resumed = run_pipeline(program, [one], replace(ctx, checkpoint=again, memory=Memory())).program
    assert again.reused >= 1 and torch.equal(resumed.run_inputs(ctx.calibration[0]), whole.run_inputs(ctx.calibration[0]))


def test_factors_and_narrow_networks_are_sites_for_later_passes() -> None:
    out = run(two_layers(), "plan_factorization{budget=0.6}", "quantize_rtn{bits=8}")
    assert all(s.compressed for s in out.program.sites()) and len(out.reports[1].taken) >= 3


def test_a_transformer_is_planned_saved_and_read_again(tmp_path: Path) -> None:
    program = fresh_program("llama")
    data = [{"input_ids": tokens(4, 16, seed=i), "attention_mask": torch.ones(4, 16, dtype=torch.int64)} for i in range(2)]
    result = fxpress.optimize(program, "plan_factorization{budget=0.6,candidates=[svd,slice]}", calibration=data)
    assert result.program.nbytes <= 0.6 * program.nbytes and "narrower networks" in result.summary()
    result.save(tmp_path / "out")
    ids = {"input_ids": tokens(1, 9, seed=5), "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    assert torch.equal(fxpress.load(tmp_path / "out").program.run(**ids)[0], result.program.run(**ids)[0])


def test_measured_time_is_a_budget() -> None:
    net = program_of(Mlp(256, 1536, 256), 48, 256, batches=1)
    out = run(net, PlanFactorization(budget=0.7, unit=Unit.LATENCY, candidates=(Kind.SLICE,), steps=8))
    assert taken(out)["up.weight[0]"].facts["width"] < 1400
    assert "ms a run on the example inputs" in out.reports[0].notes[1]


def test_refusals() -> None:
    program, ctx = two_layers()
    assert parse_pass("plan_factorization{budget=0.6}") == PlanFactorization(budget=0.6)
    for spec, why in (("plan_factorization", "budget"), ("plan_factorization{budget=0.5,unit=flops}", "did you mean|expected one of")):
        with pytest.raises(SpecError, match=why):
            parse_pass(spec)
    with pytest.raises(CalibrationError, match="calibration"):
        run_pipeline(program, [PlanFactorization(budget=0.6)], Context())
    with pytest.raises(PassError, match=r"would touch nothing.*tied to step#2"):
        fxpress.optimize(fresh_program("repeated"), "plan_factorization{budget=0.5}", calibration=[(randn(3, 4),)])
    with pytest.raises(PassError, match="put the planner before it"):
        run((program, ctx), "factorize_svd{ratio=0.5,only=[enter]}", "plan_factorization{budget=0.5}")
