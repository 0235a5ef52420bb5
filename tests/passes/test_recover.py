"""The pass as a whole: recovery after pruning, zeros, ties and statistics kept, resume after a kill, reports and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpress
from fxpress.ir.errors import CheckpointError, PassError, TrainingError
from fxpress.ir.journal import Action
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import alias_classes, named_tensors
from fxpress.passes.base import Guarantee, Pass, parse_pass
from fxpress.passes.checkpoint import Checkpoint, fingerprint
from fxpress.passes.context import Context
from fxpress.passes.examples import Labelled, as_examples
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.recover import Recover

from ..checks import assert_same
from ..tiny import randn, tokens
from .nets import output_error

RECOVER = "recover{steps=40,lr=0.01,evaluate_every=10}"


def batches(program: Program, count: int = 8) -> list[Tensor]:
    (like,) = program.inputs.leaves
    rows, columns = like.shape[0], like.shape[-1]
    return [randn(*like.shape, seed=i) if like.is_floating_point() else tokens(rows, columns, 24, seed=i) for i in range(count)]


def pruned_and_recovered(program: Program, *more: str, recover: str = RECOVER) -> tuple[fxpress.Result, fxpress.Result]:
    prune = ["prune_magnitude{sparsity=0.5,untie=true}", *more]
    data = batches(program)
    return fxpress.optimize(program, prune, calibration=data), fxpress.optimize(program, [*prune, recover], training=data)


@pytest.mark.parametrize("name", ["mlp", "conv", "conv1d", "embedding", "repeated"])
def test_recovers_accuracy_and_keeps_sparsity(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    before = {n: t.detach().clone() for n, t in named_tensors(program.graph_module)}
    pruned, recovered = pruned_and_recovered(program)
    unseen = Context(calibration=[((b,), {}) for b in batches(program, 12)[8:]])
    assert output_error(program, recovered.program, unseen) < 0.9 * output_error(program, pruned.program, unseen)
    for was, now in zip(pruned.program.sites(), recovered.program.sites(), strict=True):
        zeros = was.matrix() == 0
        assert bool((now.matrix()[zeros] == 0).all()) or float(zeros.float().mean()) < 0.05
    assert_same({n: t.detach() for n, t in named_tensors(program.graph_module)}, before)
    assert recovered.guarantee is Guarantee.TRAINED


def test_zeros_may_grow_back(captured: Callable[[str], Program]) -> None:
    _, recovered = pruned_and_recovered(captured("mlp"), recover="recover{steps=5,lr=0.003,keep_zeros=false}")
    assert all(float((s.matrix() == 0).float().mean()) < 0.3 for s in recovered.program.sites())


def test_ties_are_kept(captured: Callable[[str], Program]) -> None:
    program = captured("embedding")
    data = batches(program)
    quantized = fxpress.optimize(program, ["quantize_rtn{bits=2,only=[mix]}", RECOVER], training=data).program
    embed, head = (next(s for s in quantized.sites() if s.name == n) for n in ("embed", "head"))
    assert head.tied == ("embed",) and torch.equal(embed.matrix(), head.matrix())
    assert not torch.equal(embed.matrix(), program.sites()[0].matrix())
    assert len(alias_classes(quantized.graph_module).groups) == len({t.data_ptr() for _, t in named_tensors(quantized.graph_module)})


def test_running_statistics_stay(captured: Callable[[str], Program]) -> None:
    program = captured("conv")
    _, recovered = pruned_and_recovered(program)
    for name, tensor in program.graph_module.named_buffers():
        assert_same(get_tensor(recovered.program.graph_module, name), tensor)
    assert not torch.equal(get_tensor(recovered.program.graph_module, "bn1.weight"), get_tensor(program.graph_module, "bn1.weight"))


def test_report_and_journal(captured: Callable[[str], Program]) -> None:
    _, recovered = pruned_and_recovered(captured("conv"), "quantize_rtn{bits=4,only=[head]}")
    report = recovered.reports[-1]
    assert [t.site for t in report.taken] == ["conv1", "bn1", "conv2", "bn2"]
    assert all(0 < t.facts["relative_change"] < 1 and t.bytes_before == t.bytes_after for t in report.taken)
    assert [(s.site, "packed weights" in s.why) for s in report.skipped] == [("head", True)]
    assert "loss " in report.notes[0] and "(7 training and 1 held-out batches); 40 of 40 steps, best at step " in report.notes[0]
    assert report.notes[0] in recovered.summary()
    assert [step for step, _ in report.history] == [0, 10, 20, 30, 40] and f"-> {min(loss for _, loss in report.history):.4g} " in report.notes[0]
    changes = [c for c in recovered.program.journal.changes if c.pass_spec.startswith("recover")]
    assert [c.action for c in changes] == [Action.REWEIGHTED] * 4 and "40 steps" in changes[0].why
    assert not recovered.diff().is_empty


def test_saved_and_loaded(captured: Callable[[str], Program], tmp_path: Path) -> None:
    _, recovered = pruned_and_recovered(captured("conv"))
    recovered.save(tmp_path / "artifact")
    again = fxpress.load(tmp_path / "artifact")
    assert_same(again.program.run_examples(), recovered.program.run_examples())
    assert again.reports == recovered.reports


def test_labels_train_the_task(captured: Callable[[str], Program]) -> None:
    program = captured("conv")
    data = [Labelled(b, torch.tensor([i % 5, (i + 1) % 5])) for i, b in enumerate(batches(program))]
    for objective in ("auto", "task"):
        result = fxpress.optimize(program, f"recover{{steps=20,lr=0.01,objective={objective},held_out=0.5,evaluate_every=5}}", training=data)
        assert result.reports[0].taken
    seen = []
    with_loss = [Labelled(b, {"want": torch.ones(2, 5)}) for b in batches(program)]

    def loss(outputs: Tensor, target: dict[str, Tensor]) -> Tensor:
        seen.append(target)
        return (outputs - target["want"]).square().mean()

    result = fxpress.optimize(program, "recover{steps=20,lr=0.01,objective=task}", training=with_loss, loss=loss)
    assert seen and result.reports[0].notes[0].startswith("loss ")
    assert all(t.action == "train" for t in result.reports[0].taken)


def test_the_start_is_kept_when_training_does_not_help(captured: Callable[[str], Program]) -> None:
    pruned, recovered = pruned_and_recovered(captured("mlp"), recover="recover{steps=50,lr=10.0,warmup=0,clip=1000.0,evaluate_every=1,patience=2}")
    assert_same(recovered.program.run_examples(), pruned.program.run_examples())
    notes = recovered.reports[-1].notes
    assert "stopped early: 2 evaluations without a better one" in notes and "training never beat the start; the weights are as they were" in notes
    assert {t.action for t in recovered.reports[-1].taken} == {"keep"}


class _KillAt:
    """A loss function that dies at its n-th call."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return (outputs - target).square().mean()


@pytest.mark.parametrize("calls", [2, 40, 65])
def test_a_killed_run_resumes_bit_equal(captured: Callable[[str], Program], tmp_path: Path, calls: int) -> None:
    program = captured("conv")
    examples = as_examples([Labelled(b, torch.ones(2, 5)) for b in batches(program)], program.inputs)
    specs = ("prune_magnitude{sparsity=0.5}", "recover{steps=31,lr=0.01,accumulate=2,evaluate_every=4,checkpoint_every=3,patience=30}")
    passes: list[Pass] = [parse_pass(s) for s in specs]

    def run(loss: _KillAt, folder: str) -> tuple[Program, Any]:
        checkpoint = Checkpoint(tmp_path / folder, fingerprint(program, specs, (), 7, examples))
        done = run_pipeline(program, passes, Context(training=examples, loss=loss, seed=7, checkpoint=checkpoint))
        return done.program, [replace(r, seconds=0.0) for r in done.reports]

    want = run(_KillAt(10**9), "whole")
    with pytest.raises(KeyboardInterrupt):
        run(_KillAt(calls), "killed")
    files = {p.name for p in (tmp_path / "killed").glob("*recover*")}
    assert files == (set() if calls == 2 else {"stage-01-recover.safetensors"})
    got = run(_KillAt(10**9), "killed")
    assert_same({n: t.detach() for n, t in named_tensors(got[0].graph_module)}, {n: t.detach() for n, t in named_tensors(want[0].graph_module)})
    assert got[1] == want[1]
    finished = run(_KillAt(1), "killed")  # not one further call of the loss
    assert finished[1] == want[1]


def test_other_training_data_is_another_run(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program, data = captured("mlp"), batches(captured("mlp"))
    fxpress.optimize(program, ["prune_magnitude{sparsity=0.5}", RECOVER], training=data, checkpoint_dir=tmp_path / "c")
    with pytest.raises(CheckpointError, match="belongs to another"):
        fxpress.optimize(program, ["prune_magnitude{sparsity=0.5}", RECOVER], training=data[1:], checkpoint_dir=tmp_path / "c")


def test_dry_run_touches_nothing_and_says_what_it_costs(captured: Callable[[str], Program]) -> None:
    program = captured("conv")
    plan = fxpress.optimize(program, ["quantize_rtn{bits=4,only=[head]}", "recover{steps=1000}"], calibration=batches(program), dry_run=True)
    assert [d.site for d in plan.passes[1].plan.decisions] == ["conv1", "bn1", "conv2", "bn2"]
    short = fxpress.optimize(program, "recover{steps=1}", calibration=batches(program), dry_run=True).passes[0]
    assert sum(d.flops for d in plan.passes[1].plan.decisions) > 100 * sum(d.flops for d in short.plan.decisions) > 0


def test_refusals_come_before_any_pass_runs(captured: Callable[[str], Program]) -> None:
    program, data = captured("mlp"), batches(captured("mlp"))
    slow = "prune_magnitude{sparsity=0.5}"
    with pytest.raises(TrainingError, match="needs data; pass training="):
        fxpress.optimize(program, [slow, RECOVER])
    with pytest.raises(TrainingError, match="objective=task needs a target"):
        fxpress.optimize(program, [slow, "recover{objective=task}"], training=data)
    with pytest.raises(TrainingError, match="training batch 0: input 0: expected shape"):
        fxpress.optimize(program, [slow, RECOVER], training=[randn(3, 5)])
    with pytest.raises(TrainingError, match="matches no trainable"):
        fxpress.optimize(program, [slow, "recover{trainable=[sideways]}"], training=data)
    with pytest.raises(PassError, match="would touch nothing"):
        fxpress.optimize(program, ["quantize_rtn{bits=8}", RECOVER], training=data)
    assert not fxpress.optimize(program, ["quantize_rtn{bits=8}", "recover{allow_empty=true}"], training=data).reports[1].taken
    assert not program.journal.changes


def test_only_skip_and_trainable_choose(captured: Callable[[str], Program]) -> None:
    program = captured("conv")

    def taken(**options: Any) -> list[str]:
        ctx = Context(calibration=[((b,), {}) for b in batches(program)])
        return [d.site for d in Recover(**options).analyze(program, ctx).decisions]

    assert taken(only=("bn*",)) == ["bn1", "bn2"] and taken(skip=("conv*",)) == ["bn1", "bn2", "head"]
    assert taken(trainable=("*.bias",)) == ["bn1", "conv2", "bn2", "head"]
    result = fxpress.optimize(program, ["prune_magnitude{sparsity=0.5}", "recover{steps=10,lr=0.01,trainable=['*.bias']}"], training=batches(program))
    assert_same(get_tensor(result.program.graph_module, "bn1.weight"), get_tensor(program.graph_module, "bn1.weight"))
    assert not torch.equal(get_tensor(result.program.graph_module, "bn1.bias"), get_tensor(program.graph_module, "bn1.bias"))
