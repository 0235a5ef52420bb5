"""Matrix product operators in a graph: equal numbers of weights, the choice of the member, padding, export, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxpress
from fxpress.ir.errors import PassError, SpecError
from fxpress.passes.base import parse_pass
from fxpress.passes.contraction_order import Order
from fxpress.passes.factorize_mpo import FactorizeMpo
from fxpress.passes.factorize_svd import Metric
from fxpress.passes.pipeline import run_pipeline

from .nets import conv_net, correlated, output_error, tied_net

WEIGHED = "factorize_mpo{budget=0.5,metric=weight,allocation=equal}"


@pytest.mark.parametrize("family", [0, 1, 2, 4])
def test_every_member_keeps_the_ratio_and_runs(family: int) -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [FactorizeMpo(ratio=0.5, family=family, only=("hidden",), refine=20)], ctx)
    done.program.verify()
    facts = done.reports[0].taken[0].facts
    assert 0.4 < facts["kept"] <= 0.5 and facts["t"] == (family or 16)
    assert output_error(program, done.program, ctx) < 0.6


def test_operators_that_are_slower_than_their_weights_are_named() -> None:
    program, ctx = conv_net()
    notes = {t: run_pipeline(program, [FactorizeMpo(ratio=0.5, family=t, only=("hidden",), refine=0)], ctx).reports[0].notes for t in (1, 8)}
    assert notes[1] == () and "1 of 1 operators do more multiply-adds than the weights they replace, the worst" in notes[8][0]


def test_the_best_member_is_taken_and_reported() -> None:
    program, ctx = conv_net()
    facts = run_pipeline(program, [FactorizeMpo(ratio=0.3, only=("hidden",))], ctx).reports[0].taken[0].facts
    assert facts["output_error"] == min(facts[f"error_t{t}"] for t in (1, 2, 4, 8)) == facts[f"error_t{int(facts['t'])}"]


def test_refinement_beats_the_weight_s_own_decomposition() -> None:
    program, ctx = conv_net()
    passes = {m: FactorizeMpo(ratio=0.4, family=4, metric=m, only=("hidden",)) for m in (Metric.WEIGHT, Metric.INPUT)}
    errors = {m: output_error(program, run_pipeline(program, [one], ctx).program, ctx) for m, one in passes.items()}
    assert errors[Metric.INPUT] < 0.8 * errors[Metric.WEIGHT]


def test_a_kronecker_weight_is_recognised() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32)).eval()
    with torch.no_grad():
        net.get_parameter("0.weight").copy_(sum((torch.kron(torch.randn(8, 4), torch.randn(4, 8)) for _ in range(3)), torch.zeros(32, 32)))
    x = correlated(64, 32)
    result = fxpress.optimize(net, ["factorize_mpo{ratio=0.2}"], example_inputs=(x,), calibration=[x])
    assert result.reports[0].taken[0].facts["t"] == 4
    assert torch.allclose(result.program.run(x), net(x), atol=1e-4)


def test_primes_are_padded_and_exported_without_einsum(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(37, 53), torch.nn.ReLU(), torch.nn.Linear(53, 29, bias=False)).eval()
    x = correlated(64, 37)
    recipe, batch = ["factorize_mpo{ratio=0.6,family=4,refine=5}", "quantize_rtn{bits=8}"], {"input": {0: torch.export.Dim.AUTO}}
    result = fxpress.optimize(net, recipe, example_inputs=(x,), dynamic_shapes=batch, calibration=[x])
    assert result.program.run(x[:5]).shape == (5, 29)  # padding leaves the batch dynamic
    assert [s.name for s in result.program.sites()] == ["0.inner", "0.outer", "2.inner", "2.outer"]
    result.export_onnx(tmp_path / "model.onnx")
    assert not any(n.op_type == "Einsum" for n in onnx.load(tmp_path / "model.onnx").graph.node)
    result.save(tmp_path / "out")
    assert torch.equal(fxpress.load(tmp_path / "out").program.run(x), result.program.run(x))


def test_three_sites_are_stored_and_rebuilt(tmp_path: Path) -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [FactorizeMpo(ratio=0.5, sites=3, metric=Metric.WEIGHT, only=("hidden",))], ctx)
    site = next(s for s in done.program.sites() if s.name == "hidden")
    assert site.format.name == "tensor_train" and 0.3 < done.reports[0].taken[0].facts["kept"] <= 0.5
    assert site.nbytes == done.reports[0].taken[0].bytes_after and output_error(program, done.program, ctx) < 1
    full = run_pipeline(program, [FactorizeMpo(chi=40, sites=3, metric=Metric.WEIGHT, only=("hidden",), allow_empty=True)], ctx)
    assert "3 cores of bond 40 hold" in next(s.why for s in full.reports[0].skipped if s.site == "hidden")
    with pytest.raises(SpecError, match="stores balanced cores of the weight alone"):
        parse_pass("factorize_mpo{ratio=0.5,sites=3}")
    with pytest.raises(SpecError, match="stores balanced cores of the weight alone"):
        parse_pass("factorize_mpo{budget=0.5,sites=3,metric=weight,allocation=equal}")


def test_three_sites_within_a_tolerance() -> None:
    program, ctx = conv_net()
    passes = {t: FactorizeMpo(tolerance=t, sites=3, metric=Metric.WEIGHT, only=("hidden",)) for t in (0.8, 0.01)}
    taken = {t: run_pipeline(program, [one], ctx).reports[0].taken[0] for t, one in passes.items()}
    assert taken[0.8].facts["weight_error"] <= 0.8 and taken[0.8].facts["kept"] < 0.7
    assert taken[0.01].action.startswith("left as it is: cores within tolerance=0.01 hold") and taken[0.01].bytes_after == taken[0.01].bytes_before


@pytest.mark.parametrize("family", [1, 4, None])
def test_the_smallest_bond_within_a_tolerance(family: int | None) -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [FactorizeMpo(tolerance=0.25, family=family, only=("hidden",))], ctx)
    facts = done.reports[0].taken[0].facts
    assert facts["output_error"] <= 0.25
    below = FactorizeMpo(chi=int(facts["chi"]) - 1, family=int(facts["t"]), only=("hidden",))
    assert run_pipeline(program, [below], ctx).reports[0].taken[0].facts["output_error"] > 0.25
    if family is None:
        others = [FactorizeMpo(tolerance=0.25, family=t, only=("hidden",)) for t in (1, 2, 4, 8)]
        assert facts["kept"] <= min(run_pipeline(program, [one], ctx).reports[0].taken[0].facts["kept"] for one in others)


def test_a_tolerance_of_the_weight_and_one_that_cannot_be_met() -> None:
    program, ctx = conv_net()
    taken = run_pipeline(program, [FactorizeMpo(tolerance=0.7, family=4, metric=Metric.WEIGHT, only=("hidden",))], ctx).reports[0].taken[0]
    assert taken.facts["weight_error"] <= 0.7
    one = run_pipeline(program, [FactorizeMpo(chi=int(taken.facts["chi"]) - 1, family=4, metric=Metric.WEIGHT, only=("hidden",))], ctx)
    assert one.reports[0].taken[0].facts["weight_error"] > 0.7
    left = run_pipeline(program, [FactorizeMpo(tolerance=1e-6, only=("hidden",))], ctx).reports[0].taken[0]
    assert left.action == "left as it is: no bond that makes it smaller meets tolerance=1e-06"


@pytest.mark.parametrize("spec", ["factorize_mpo{budget=0.5}", "factorize_mpo{budget=0.5,family=4,allocation=equal}", WEIGHED])
def test_a_budget_over_several_sites(spec: str) -> None:
    program, ctx = tied_net()
    done = run_pipeline(program, [parse_pass(spec)], ctx)
    held = sum(s.parameters for s in done.program.sites() if s.name.startswith(("up", "down")))
    assert 0.4 * 4096 < held <= 0.5 * 4096
    assert done.reports[0].notes[0].startswith("budget: ") and "tied" in next(s.why for s in done.reports[0].skipped if s.site == "head")


@pytest.mark.parametrize("order", list(Order))
def test_either_order_computes_the_same(order: Order) -> None:
    program, ctx = conv_net()
    runs = [run_pipeline(program, [FactorizeMpo(ratio=0.5, family=0, order=o, only=("hidden",), refine=2)], ctx) for o in (Order.ARITHMETIC, order)]
    assert output_error(runs[0].program, runs[1].program, ctx) < 1e-5


def test_refusals() -> None:
    program, ctx = tied_net()
    for spec, why in (
        ("factorize_mpo{chi=500,only=[up]}", "chi=500 is more than the exact bond 32"),
        ("factorize_mpo{chi=30,family=4,only=[up]}", "cores of bond 30 hold 2,880 weights, the weight itself 2,048"),
        ("factorize_mpo{ratio=0.01,only=[up]}", "cores of bond 1 hold 96 weights"),
    ):
        with pytest.raises(PassError, match=why):
            run_pipeline(program, [parse_pass(spec)], ctx)
    for spec in ("factorize_mpo", "factorize_mpo{ratio=0.5,chi=3}"):
        with pytest.raises(SpecError, match="exactly one of ratio, chi, tolerance and budget"):
            parse_pass(spec)
    with pytest.raises(SpecError, match="metric=both is not built"):
        parse_pass("factorize_mpo{ratio=0.5,metric=both}")
    with pytest.raises(SpecError, match="give allocation=equal, or metric=input"):
        parse_pass("factorize_mpo{budget=0.5,metric=weight}")
    with pytest.raises(PassError, match=r"budget=0.01 of 4,096 parameters at 2 sites is below the floor: rank 1 at every site already holds 192"):
        run_pipeline(program, [parse_pass("factorize_mpo{budget=0.01}")], ctx)


def test_few_tokens_and_dead_channels() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(30, 41)).eval()
    x = correlated(5, 30)
    x[:, 7:15] = 0
    for one in (FactorizeMpo(ratio=0.5, family=4), FactorizeMpo(ratio=0.5)):
        result = fxpress.optimize(net, [one], example_inputs=(x,), calibration=[x])
        y, wanted = result.program.run(x).detach(), net(x).detach()
        assert bool(torch.isfinite(y).all()) and float((y - wanted).norm() / wanted.norm()) < 0.05
    blank = torch.zeros(5, 30)
    result = fxpress.optimize(net, [FactorizeMpo(ratio=0.5)], example_inputs=(blank,), calibration=[blank])
    assert torch.allclose(result.program.run(blank), net(blank), atol=1e-6)
