"""Nesting: the full model stays, prefixes are better than arbitrary ones, every architecture, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxpress
from fxpress.ir.errors import CalibrationError, SpecError
from fxpress.passes.base import parse_pass
from fxpress.passes.nest import Nest
from fxpress.passes.nesting.orders import NestImportance

from ..masking import difference, outputs
from ..tiny import fresh_program, randn
from .structured.nets import mlp
from .test_decompose_modules import data

ARCHITECTURES = ("llama", "gpt2", "opt", "bert", "vit")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_full_model_is_what_it_was(name: str) -> None:
    program = fresh_program(name)
    result = fxpress.optimize(program, "nest{centre=true}", calibration=data(name))
    assert difference(outputs(result.program), outputs(program)) < 1e-5
    assert {t.action.split(":")[0] for t in result.reports[0].taken} == ({"ffn", "head", "kv_group"} if name == "llama" else {"ffn", "head"})
    assert "moved by" in result.reports[0].notes[0] and result.guarantee.value == "exact"


def test_a_plan_moves_nothing_and_later_passes_see_a_nested_model() -> None:
    program = fresh_program("llama")
    run = fxpress.optimize(program, ["nest", "slice{ratio=0.5}"], calibration=data("llama"), dry_run=True)
    assert [len(p.plan.decisions) for p in run.passes] == [6, 2] and fresh_program("llama").nbytes == program.nbytes


@pytest.mark.parametrize("importance", [NestImportance.ELIMINATION, NestImportance.WANDA, NestImportance.LOSS])
def test_a_prefix_of_the_order_beats_one_of_the_old_order(importance: NestImportance) -> None:
    program, ctx = mlp()
    errors = {}
    for passes in ((f"nest{{importance={importance.value},centre=true}}", "slice{ratio=0.6,multiple_of=1}"), ("slice{ratio=0.6,multiple_of=1,unsorted=true}",)):
        done = fxpress.optimize(program, list(passes), calibration=[c[0] for c in ctx.calibration])
        errors[len(passes)] = sum(float((done.program.run(*c[0]) - program.run(*c[0])).square().sum()) for c in ctx.calibration)
    assert errors[2] < 0.7 * errors[1]


def test_taking_the_mean_off_helps_every_prefix() -> None:
    program, ctx = mlp()
    for ratio in (0.3, 0.6, 0.8):
        errors = {}
        for centred in ("true", "false"):
            specs = [f"nest{{centre={centred}}}", f"slice{{ratio={ratio},multiple_of=1}}"]
            done = fxpress.optimize(program, specs, calibration=[c[0] for c in ctx.calibration])
            errors[centred] = sum(float((done.program.run(*c[0]) - program.run(*c[0])).square().sum()) for c in ctx.calibration)
        assert errors["true"] < errors["false"]


def test_it_is_saved_and_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    result = fxpress.optimize(fresh_program("llama"), "nest{centre=true}", calibration=data("llama"))
    result.save(tmp_path / "nested")
    again = fxpress.load(tmp_path / "nested")
    small = fxpress.optimize(again.program, "slice{ratio=0.5}")
    assert small.program.parameters < again.program.parameters
    assert result.export_onnx(tmp_path / "model.onnx").max_error < 1e-4


def test_refusals() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        fxpress.optimize(fresh_program("mlp"), "nest")
    with pytest.raises(SpecError, match="importance"):
        parse_pass("nest{importance=best}")
    skipped = fxpress.optimize(fresh_program("conv1d"), "nest{allow_empty=true,roles=[conv_out]}", calibration=[(randn(2, 2, 24),)]).reports[0].skipped
    assert any("no plain linear layer" in s.why for s in skipped)
    assert Nest(roles=()).roles == () and torch.is_tensor(randn(1))
