"""Structured pruning end to end on tiny models: amounts met, graphs that run, export, save and compose, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxpress
from fxpress.ir.axes import analyze_axes
from fxpress.ir.capture import capture
from fxpress.ir.errors import CalibrationError, PassError, SpecError
from fxpress.ir.program import Program
from fxpress.ir.structure import Role, find_structure
from fxpress.passes.prune_structured import PruneStructured
from fxpress.passes.structured.compensate import Compensation
from fxpress.passes.structured.scores import Importance

from ..checks import assert_same, relative_error
from ..grouping import some_slow
from ..masking import outputs
from ..tiny import Mlp, fresh_program, randn, tiny
from .structured.nets import mlp, redundant

MODELS = ("llama", "llama_tied", "llama_eager", "opt", "gpt2", "bert", "vit", "resnet", "convnext", "mobilenet_v2")


def data(name: str) -> list[Any]:
    args, kwargs = tiny(name).call
    return [kwargs or args]


def prune(name: str, spec: str, program: Program | None = None) -> Any:
    return fxpress.optimize(program or fresh_program(name), spec, calibration=data(name))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranking", some_slow(["uniform", "global"], "uniform"))
def test_every_model_gets_smaller_and_still_runs(name: str, ranking: str) -> None:
    result = prune(name, f"prune_structured{{ratio=0.4,importance=wanda,multiple_of=1,ranking={ranking}}}")
    assert result.program.parameters < fresh_program(name).parameters
    assert all(torch.isfinite(o).all() for o in outputs(result.program))
    other = tiny(name).other
    if other is not None:
        result.program.run_inputs(other)
    assert {t.action.split(":")[0] for t in result.reports[0].taken} <= {"ffn", "head", "kv_group", "conv_out"}


@pytest.mark.parametrize("unit", ["parameters", "macs"])
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_budgets_are_met_and_not_overshot(name: str, unit: str) -> None:
    program = fresh_program(name)
    small = prune(name, f"prune_structured{{{unit}=0.8,importance=l2,multiple_of=1}}", program).program
    share = small.parameters / program.parameters if unit == "parameters" else analyze_axes(small).macs() / analyze_axes(program).macs()
    assert 0.7 < share <= 0.8


def test_a_latency_budget_is_measured() -> None:
    program = capture(Mlp(256, 4096, 256).eval(), (randn(64, 256),))
    result = fxpress.optimize(program, "prune_structured{latency=0.5,importance=l2,multiple_of=64}")
    assert result.program.parameters < 0.8 * program.parameters


def test_ratio_of_a_uniform_run_is_each_groups_own() -> None:
    result = prune("llama", "prune_structured{ratio=0.25,roles=[ffn],ranking=uniform}")
    assert [(t.facts["size"], t.facts["kept"]) for t in result.reports[0].taken] == [(88, 64), (88, 64)]


def test_the_least_important_units_go() -> None:
    program, ctx = redundant()
    result = fxpress.optimize(program, "prune_structured{ratio=0.5,multiple_of=1}", calibration=[c[0] for c in ctx.calibration])
    assert result.reports[0].taken[0].facts["kept"] == 4
    rows = ctx.calibration[0][0][0][:32]
    assert relative_error(result.program.run(rows), program.run(rows)) < 0.05


def test_without_compensation_removal_equals_masking() -> None:
    program, ctx = mlp()
    spec = PruneStructured(ratio=0.5, importance=Importance.WANDA, compensation=Compensation.OFF, multiple_of=1)
    small = fxpress.optimize(program, spec, calibration=[c[0] for c in ctx.calibration]).program
    kept = small.sites()[0].matrix()
    rows = [r.tolist() for r in program.sites()[0].matrix()]
    indices = [rows.index(r.tolist()) for r in kept]
    assert indices == sorted(indices)
    assert torch.equal(small.sites()[1].matrix(), program.sites()[1].matrix()[:, indices])


def test_two_runs_are_equal() -> None:
    spec = "prune_structured{ratio=0.3,importance=taylor,multiple_of=1}"
    assert_same(outputs(prune("gpt2", spec).program), outputs(prune("gpt2", spec).program))


def test_residual_widths_can_be_pruned_when_asked() -> None:
    result = prune("llama_tied", "prune_structured{ratio=0.25,roles=[residual],importance=wanda,ranking=uniform,compensation=off}")
    table = next(s for s in result.program.sites() if s.kind.value == "embedding")
    assert table.shape == (96, 24)
    assert torch.isfinite(outputs(result.program)[0]).all()


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_the_pruned_program_saves_loads_and_exports(name: str, tmp_path: Path) -> None:
    result = prune(name, "prune_structured{ratio=0.4,importance=wanda,multiple_of=1}")
    result.save(tmp_path / "out")
    loaded = fxpress.load(tmp_path / "out").program
    assert_same(outputs(loaded), outputs(result.program))
    analysis = analyze_axes(loaded)  # a loaded program carries no shapes: they are found again
    assert analysis.macs() == analyze_axes(result.program).macs()
    again = capture(result.program.to_exported())
    assert_same(outputs(again), outputs(result.program))
    report = result.export_onnx(tmp_path / "model.onnx")
    assert report.max_error < 1e-4


def test_pruning_composes_with_quantization_and_itself() -> None:
    recipe = ["prune_structured{ratio=0.3,importance=wanda,multiple_of=8}", "prune_wanda{sparsity=0.5}", "quantize_rtn{bits=4,group_size=16}"]
    result = fxpress.optimize(fresh_program("llama"), recipe, calibration=data("llama"))
    assert [bool(r.taken) for r in result.reports] == [True, True, True]
    late = fxpress.optimize(fresh_program("llama"), [recipe[2] + "", "prune_structured{ratio=0.3,allow_empty=true}"], calibration=data("llama"))
    assert {s.why for s in late.reports[1].skipped} == {s.why for s in late.reports[1].skipped if "prune before quantizing" in s.why}
    twice = fxpress.optimize(fresh_program("llama"), [recipe[0], recipe[0]], calibration=data("llama"))
    assert twice.program.parameters < fxpress.optimize(fresh_program("llama"), recipe[:1], calibration=data("llama")).program.parameters


def test_the_plan_prints_every_group() -> None:
    dry = fxpress.optimize(fresh_program("llama"), "prune_structured{ratio=0.3,importance=wanda}", calibration=data("llama"), dry_run=True)
    plan = dry.passes[0].plan
    structure = find_structure(fresh_program("llama"))
    wanted = {c.name for r in (Role.FFN, Role.HEAD, Role.KV_GROUP) for c in structure.with_role(r)}
    assert {d.site for d in plan.decisions} | {s.site for s in plan.skips} == wanted
    assert all(d.facts["kept"] < d.facts["size"] for d in plan.decisions)
    assert all(f"{d.site}: {d.action}" in str(dry) for d in plan.decisions)


def test_the_diff_shows_what_shrank() -> None:
    result = prune("llama", "prune_structured{ratio=0.25,roles=[ffn],ranking=uniform}")
    retyped = {e.before.module for e in result.diff().changed if e.before is not None}
    assert {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"} <= retyped
    assert "f32[64, 32]" in result.diff().to_text() or "64" in result.diff().to_text()


def test_names_leave_groups_out() -> None:
    result = prune("llama", "prune_structured{ratio=0.25,roles=[ffn],ranking=uniform,skip=[model.layers.0.*]}")
    assert [t.site.split(".")[2] for t in result.reports[0].taken] == ["1"]
    assert any("skip pattern" in s.why for s in result.reports[0].skipped)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("prune_structured", SpecError, "exactly one of ratio, parameters, macs and latency"),
        ("prune_structured{ratio=0.5,macs=0.5}", SpecError, "exactly one"),
        ("prune_structured{ratio=1.0}", SpecError, "must be < 1"),
        ("prune_structured{ratio=0.5,roles=[heads]}", SpecError, "did you mean 'head'"),
        ("prune_structured{parameters=0.1,importance=l2}", PassError, "cannot reach 10.0%"),
        ("prune_structured{ratio=0.5,roles=[conv_out]}", PassError, "it has no conv_out"),
        ("prune_structured{ratio=0.5,roles=[ffn],only=[nothing]}", PassError, "not in only="),
        ("prune_structured{ratio=0.9,min_keep=1.0,importance=l2}", PassError, "cannot reach"),
    ],
)
def test_bad_requests_are_refused(spec: str, error: type[Exception], message: str) -> None:
    program = fresh_program("llama")
    before = program.to_text()
    with pytest.raises(error, match=message):
        fxpress.optimize(program, spec, calibration=data("llama"))
    assert program.to_text() == before


def test_data_are_asked_for_by_name() -> None:
    with pytest.raises(CalibrationError, match="calibration"):
        fxpress.optimize(fresh_program("llama"), "prune_structured{ratio=0.5}")
    small = fxpress.optimize(fresh_program("llama"), "prune_structured{ratio=0.5,importance=l2}").program  # weights need no data
    assert small.parameters < fresh_program("llama").parameters


def test_the_highest_ratio_keeps_one_of_each() -> None:
    result = prune("llama", "prune_structured{ratio=0.999,importance=l2,ranking=uniform,multiple_of=1,min_keep=0.0}")
    assert {t.facts["kept"] for t in result.reports[0].taken} == {1}
    assert torch.isfinite(outputs(result.program)[0]).all()
