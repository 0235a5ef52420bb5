"""Recover by layers, by weights and of changed parts alone: through `optimize`, against what stays, with its refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpress
from fxpress.ir.errors import CalibrationError, PassError, SpecError, TrainingError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors
from fxpress.passes.base import parse_pass
from fxpress.passes.context import Context
from fxpress.passes.recover import Recover, Scope

from ..checks import assert_same
from ..tiny import Mlp, fresh_program, randn, tokens
from .healing_nets import batch, tower
from .nets import output_error

DATA = [batch(s) for s in range(1, 9)]
UNSEEN = Context(calibration=[((batch(s),), {}) for s in range(20, 24)])
PAIRS = "factorize_svd{ratio=0.5,metric=weight,only=['layers.*']}"
BLOCK = "recover{scope=block,steps=30,lr=0.005,evaluate_every=10}"


def moved(one: Program, other: Program) -> set[str]:
    return {n for n, t in named_tensors(one.graph_module) if not torch.equal(t, get_tensor(other.graph_module, n))}


@pytest.mark.parametrize("recover", [BLOCK, BLOCK.replace("}", ",changed=true}"), "recover{scope=local}", "recover{steps=30,lr=0.005,changed=true}"])
def test_every_scope_brings_the_outputs_nearer(recover: str) -> None:
    plain = fxpress.optimize(tower(), PAIRS, calibration=DATA)
    result = fxpress.optimize(tower(), [PAIRS, recover], calibration=DATA)
    assert output_error(tower(), result.program, UNSEEN) < 0.9 * output_error(tower(), plain.program, UNSEEN)
    report = result.reports[-1]
    assert report.taken and report.notes and all(t.bytes_before == t.bytes_after for t in report.taken)
    changes = {c.before.module: c for c in result.program.journal.changes if c.pass_spec.startswith("recover") and c.before is not None}
    assert " -> " in changes["layers.0.up.down"].why and changes["layers.0.up.down"].facts["relative_change"] > 0


def test_a_language_model_healed_by_layers_agrees_better_and_the_rest_is_bit_equal() -> None:
    original, layer = fresh_program("llama"), "factorize_svd{ratio=0.5,metric=weight,only=['*layers.1.*']}"
    calls = [{"input_ids": tokens(4, 16, seed=s), "attention_mask": torch.ones(4, 16, dtype=torch.int64)} for s in range(12)]
    plain = fxpress.optimize(original, layer, calibration=calls[:8]).program
    result = fxpress.optimize(original, [layer, "recover{scope=block,steps=30,lr=0.002}"], calibration=calls[:8])

    def divergence(program: Program) -> float:
        one, other = (torch.cat([p.run(**c)[0] for c in calls[8:]]).double().log_softmax(-1) for p in (original, program))
        return float((one.exp() * (one - other)).sum(-1).mean())

    assert divergence(result.program) < 0.95 * divergence(plain)
    assert all(".layers.1." in n for n in moved(result.program, plain)) and moved(result.program, plain)


def test_changed_trains_the_factors_alone() -> None:
    spec = "factorize_mpo{ratio=0.6,metric=weight,family=2,only=[layers.1.up]}"
    plain = fxpress.optimize(tower(), spec, calibration=DATA).program
    for recover in ("recover{steps=5,changed=true}", BLOCK.replace("}", ",changed=true}")):
        result = fxpress.optimize(tower(), [spec, recover], calibration=DATA)
        assert moved(result.program, plain) == {"layers.1.up.inner.weight", "layers.1.up.outer.weight", "layers.1.up.bias"}
        assert {s.why for s in result.reports[-1].skipped if s.site == "head"} == {"no earlier pass changed it, and changed=true"}


def test_defaults_are_those_of_the_scope_and_old_specs_mean_what_they_did() -> None:
    assert [(Recover(scope=s).resolved().steps, Recover(scope=s).resolved().lr) for s in Scope] == [s.defaults for s in Scope]
    assert Scope.MODEL.defaults == (200, 1e-4)
    assert parse_pass("recover") == Recover() and parse_pass("recover{steps=7}").to_spec() == "recover{steps=7}"
    assert Recover(scope=Scope.BLOCK, steps=7, lr=0.1).resolved() == Recover(scope=Scope.BLOCK, steps=7, lr=0.1)
    with pytest.raises(SpecError, match="did you mean 'block'"):
        parse_pass("recover{scope=blok}")


@pytest.mark.parametrize("recover", [BLOCK, "recover{scope=local,steps=10}"])
def test_a_finished_run_is_read_from_its_checkpoint(tmp_path: Path, recover: str) -> None:
    def run(folder: Path) -> tuple[Program, list[Any]]:
        result = fxpress.optimize(tower(), [PAIRS, recover], calibration=DATA, checkpoint_dir=folder)
        return result.program, [replace(r, seconds=0.0) for r in result.reports]

    whole = run(tmp_path / "a")
    for again in (run(tmp_path / "b"), run(tmp_path / "b")):
        assert_same(dict(_tensors(again[0])), dict(_tensors(whole[0])))
        assert again[1] == whole[1]


def _tensors(program: Program) -> list[tuple[str, Tensor]]:
    return [(n, t.detach()) for n, t in named_tensors(program.graph_module)]


def test_a_plan_says_what_it_costs() -> None:
    plans = [fxpress.optimize(tower(), [PAIRS, r], calibration=DATA, dry_run=True).passes[1].plan for r in (BLOCK, BLOCK.replace("30", "60"))]
    one, two = (sum(d.flops for d in p.decisions) for p in plans)
    assert two == pytest.approx(2 * one) and one > 0


def test_refusals_say_the_way_out() -> None:
    plain = fxpress.capture(Mlp().eval(), (randn(4, 12),))
    inputs = [randn(4, 12, seed=s) for s in range(4)]
    with pytest.raises(PassError, match=r"residual stream; it has none\. Use scope=model"):
        fxpress.optimize(plain, ["prune_magnitude{sparsity=0.5}", BLOCK], training=inputs)
    with pytest.raises(PassError, match="no earlier pass changed its layer; scope=model trains it all the same"):
        fxpress.optimize(tower(), BLOCK, training=DATA)
    with pytest.raises(PassError, match="no earlier pass changed it, and changed=true"):
        fxpress.optimize(tower(), "recover{changed=true}", training=DATA)
    with pytest.raises(PassError, match="is no factor of a weight of the original; scope=block and scope=model train it"):
        fxpress.optimize(tower(), ["prune_magnitude{sparsity=0.5}", "recover{scope=local}"], training=DATA)
    with pytest.raises((TrainingError, CalibrationError), match="needs data"):
        fxpress.optimize(tower(), [PAIRS, "recover{scope=local}"])
