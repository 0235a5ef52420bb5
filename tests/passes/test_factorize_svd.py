"""Low-rank pairs in a graph: rank rules, metrics, biases, composition with quantizers, refusals, resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxpress
from fxpress.ir.capture import capture
from fxpress.ir.errors import PassError, SpecError
from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.factorize_svd import FactorizeSvd, Metric
from fxpress.passes.memory import Memory
from fxpress.passes.pipeline import plan_passes, run_pipeline
from fxpress.passes.rank_budget import Allocation

from .nets import conv_net, correlated, output_error, tied_net

HIDDEN = ("hidden",)


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {s.name: s.shape for s in program.sites()}


def test_the_ratio_is_what_is_kept() -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [FactorizeSvd(ratio=0.5, only=HIDDEN)], ctx)
    rank = int(0.5 * 40 * 256 / 296)
    assert _shapes(done.program)["hidden.down"] == (rank, 256) and _shapes(done.program)["hidden.up"] == (40, rank)
    taken = done.reports[0].taken[0]
    assert taken.facts["rank"] == rank and taken.facts["kept"] <= 0.5 and taken.bytes_after == rank * 296 * 4
    assert done.reports[0].bytes_before - done.reports[0].bytes_after == 4 * (40 * 256 - rank * 296)
    assert next(s for s in done.program.sites() if s.name == "hidden.up").bias == "hidden.bias"


def test_data_beats_the_weight_s_own_error() -> None:
    program, ctx = conv_net()
    errors = {m: output_error(program, run_pipeline(program, [FactorizeSvd(ratio=0.3, metric=m, only=HIDDEN)], ctx).program, ctx) for m in list(Metric)[:2]}
    assert errors[Metric.INPUT] < 0.8 * errors[Metric.WEIGHT]


def test_a_tolerance_bounds_the_measured_error() -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [FactorizeSvd(tolerance=0.2, multiple=2)], ctx)
    first = done.reports[0].taken[0]
    assert first.facts["output_error"] <= 0.2 and first.facts["rank"] % 2 == 0
    kept = run_pipeline(program, [FactorizeSvd(tolerance=1e-6, only=HIDDEN)], ctx)
    assert kept.reports[0].taken[0].action.startswith("left as it is: a pair of rank") and _shapes(kept.program) == _shapes(program)


def test_factors_are_sites_for_the_next_pass() -> None:
    program, ctx = conv_net()
    passes = [parse_pass(p) for p in ("factorize_svd{ratio=0.6,only=[hidden]}", "quantize_gptq{bits=8,group_size=8,kinds=[linear]}")]
    assert [d.site for d in plan_passes(program, passes, ctx)[1].plan.decisions] == ["hidden.down", "hidden.up", "head"]
    done = run_pipeline(program, passes, ctx)
    held = {s.name for s in done.program.sites() if s.compressed}
    assert held == {"hidden.down", "hidden.up", "head"}
    assert output_error(run_pipeline(program, passes[:1], ctx).program, done.program, ctx) < 0.03


def test_export_and_save_keep_the_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)).eval()
    x = correlated(16, 32)
    result = fxpress.optimize(model, ["factorize_svd{ratio=0.5}", "quantize_rtn{bits=8}"], example_inputs=(x,), calibration=[x])
    result.save(tmp_path / "out")
    again = fxpress.load(tmp_path / "out")
    assert torch.equal(again.program.run(x), result.program.run(x))
    onnx = pytest.importorskip("onnx")
    result.export_onnx(tmp_path / "model.onnx")
    assert not any(n.op_type == "Einsum" for n in onnx.load(tmp_path / "model.onnx").graph.node)


def test_outputs_can_count_by_their_fisher_information() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Linear(32, 8)).eval()
    with torch.no_grad():
        net.get_parameter("1.weight")[:, 16:] = 0  # half of the first layer's outputs do not matter
    x = correlated(64, 24)
    errors = {}
    for metric in (Metric.INPUT, Metric.BOTH):
        result = fxpress.optimize(
            net, [FactorizeSvd(rank=6, metric=metric, only=("0",))], example_inputs=(x,), calibration=[x], training=[x], loss=lambda y, _: y.square().sum()
        )
        errors[metric] = float((result.program.run(x) - net(x)).norm() / net(x).norm().detach())
    assert errors[Metric.BOTH] < 0.8 * errors[Metric.INPUT]


def test_refusals() -> None:
    program, ctx = tied_net()
    skipped = {s.site: s.why for s in run_pipeline(program, [FactorizeSvd(ratio=0.5)], ctx).reports[0].skipped}
    assert skipped["head"].startswith("its weight is tied to embed") and "embedding" in skipped["embed"]
    for rank, why in ((22, "a pair of rank 22 holds 2,112 weights, the weight itself 2,048"), (33, "more than the full rank 32")):
        with pytest.raises(PassError, match=why):
            run_pipeline(program, [FactorizeSvd(rank=rank, only=("up",))], ctx)
    with pytest.raises(PassError, match="leaves no rank of at least 16"):
        run_pipeline(program, [FactorizeSvd(ratio=0.1, multiple=16, only=("up",))], ctx)
    for spec in ("factorize_svd", "factorize_svd{ratio=0.5,rank=3}"):
        with pytest.raises(SpecError, match="exactly one of ratio, rank, tolerance and budget"):
            parse_pass(spec)


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    program, ctx = conv_net()
    one = FactorizeSvd(ratio=0.5)
    whole = run_pipeline(program, [one], ctx).program
    first = Checkpoint(tmp_path, "x")
    run_pipeline(program, [one], replace(ctx, checkpoint=first))
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    again = Checkpoint(tmp_path, "x")
    resumed = run_pipeline(program, [one], replace(ctx, checkpoint=again)).program
    assert again.reused >= 1
    x = ctx.calibration[0]
    assert torch.equal(resumed.run_inputs(x), whole.run_inputs(x))


def test_fewer_tokens_than_channels_and_constant_inputs() -> None:
    program, _ = conv_net()
    for batch in (correlated(1, 3, 4, 4).expand(8, -1, -1, -1).contiguous(), torch.zeros(8, 3, 4, 4)):
        ctx = Context(calibration=as_calls([batch], program.inputs))
        done = run_pipeline(program, [FactorizeSvd(ratio=0.5, only=HIDDEN)], ctx)
        assert bool(torch.isfinite(done.program.run_inputs(ctx.calibration[0])).all()) and output_error(program, done.program, ctx) < 1e-3


@pytest.mark.parametrize("allocation", list(Allocation))
@pytest.mark.parametrize("metric", [Metric.INPUT, Metric.BOTH])
def test_a_budget_over_several_sites(metric: Metric, allocation: Allocation) -> None:
    program, ctx = tied_net()
    ctx = replace(ctx, memory=Memory())
    done = run_pipeline(program, [FactorizeSvd(budget=0.5, metric=metric, allocation=allocation, multiple=2)], ctx)
    held = sum(s.parameters for s in done.program.sites() if s.name.startswith(("up", "down")))
    assert 0.4 * 4096 < held <= 0.5 * 4096 and all(r.facts["rank"] % 2 == 0 for r in done.reports[0].taken)


class _Branches(torch.nn.Module):
    """Two linears side by side: one nearly of rank 4, one of full rank."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.full = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        with torch.no_grad():
            self.low.weight.copy_(torch.randn(32, 4) @ torch.randn(4, 32) / 4 + 0.001 * torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.low(x), self.full(x)], -1)


def test_a_budget_beats_equal_shares() -> None:
    torch.manual_seed(0)
    program = capture(_Branches().eval(), (x := torch.randn(64, 32),))
    ctx = Context(calibration=as_calls([x], program.inputs))
    errors = []
    for one in (FactorizeSvd(ratio=0.6), FactorizeSvd(budget=0.6), FactorizeSvd(budget=0.6, allocation=Allocation.EQUAL)):
        done = run_pipeline(program, [one], ctx)
        assert sum(s.parameters for s in done.program.sites()) <= 0.6 * 2048
        errors.append(output_error(program, done.program, ctx))
    assert max(errors[1:]) < 0.7 * errors[0]


def test_spectra_are_made_once_for_every_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, ctx = tied_net()
    made: list[int] = []
    inner = FactorizeSvd.gains
    monkeypatch.setattr(FactorizeSvd, "gains", lambda *args: made.append(1) or inner(*args))  # type: ignore[func-returns-value]
    ctx = replace(ctx, memory=Memory(), checkpoint=Checkpoint(tmp_path, "mark"))
    for budget in (0.4, 0.5, 0.6):
        FactorizeSvd(budget=budget).analyze(program, ctx)
    FactorizeSvd(budget=0.5).analyze(program, replace(ctx, memory=Memory()))  # a run after a kill
    assert len(made) == 2 and ctx.checkpoint is not None and ctx.checkpoint.reused == 1


def test_a_budget_after_a_pass_that_has_not_run_yet() -> None:
    program, ctx = tied_net()
    passes = [parse_pass(p) for p in ("factorize_svd{ratio=0.8,only=[up]}", "factorize_svd{budget=0.5,only=[down]}")]
    ghost = plan_passes(program, passes, ctx)[1].plan.decisions[0]
    done = run_pipeline(program, passes, replace(ctx, memory=Memory()))
    assert ghost.facts["rank"] == done.reports[1].taken[0].facts["rank"] == 10  # one site: its share is the budget


def test_a_budget_below_the_floor_and_without_outputs() -> None:
    program, ctx = tied_net()
    with pytest.raises(PassError, match=r"budget=0.1 of 4,096 parameters at 2 sites is below the floor: rank 8 at every site already holds 1,536"):
        run_pipeline(program, [FactorizeSvd(budget=0.1, multiple=8)], ctx)
    with pytest.raises(SpecError, match="give allocation=equal, or metric=input"):
        parse_pass("factorize_svd{budget=0.5,metric=weight}")
    with pytest.raises(SpecError, match="exactly one of ratio, rank, tolerance and budget"):
        parse_pass("factorize_svd{budget=0.5,rank=3}")


def test_convolutions_when_asked() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(6, 12, 3, stride=2, padding=1), torch.nn.Conv2d(12, 10, 1), torch.nn.Conv2d(10, 10, 3, groups=10)).eval()
    x = correlated(8, 6, 9, 9)
    with pytest.raises(PassError, match="factorize_svd takes addmm, linear, mm"):
        fxpress.optimize(net, ["factorize_svd{ratio=0.6}"], example_inputs=(x,), calibration=[x])
    result = fxpress.optimize(net, ["factorize_svd{ratio=0.6,convolutions=true}"], example_inputs=(x,), calibration=[x])
    result.program.verify()
    assert _shapes(result.program) == {"0.down": (5, 6, 3, 3), "0.up": (12, 5, 1, 1), "1.down": (3, 12, 1, 1), "1.up": (10, 3, 1, 1), "2": (10, 1, 3, 3)}
    assert "10 groups" in {s.site: s.why for s in result.reports[0].skipped}["2"]
    alone = torch.nn.Sequential(torch.nn.Conv2d(6, 12, 3, stride=2, padding=1, bias=False)).eval()
    pair = fxpress.optimize(alone, ["factorize_svd{rank=5,convolutions=true}"], example_inputs=(x,), calibration=[x])
    with torch.no_grad():
        measured = float((pair.program.run(x) - alone(x)).norm() / alone(x).norm())
    assert pair.reports[0].taken[0].facts["output_error"] == pytest.approx(measured, rel=1e-3)
