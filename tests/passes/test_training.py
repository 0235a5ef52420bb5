"""`fine_tune`: what it minimises, determinism, early stopping, values that are not finite, and data it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.ir.errors import TrainingError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors, set_tensor
from fxpress.passes import training
from fxpress.passes.context import Context
from fxpress.passes.examples import Example, Labelled, as_examples, split
from fxpress.passes.losses import Objective, relative_error
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.prune_magnitude import PruneMagnitude
from fxpress.passes.quantize_rtn import QuantizeRtn
from fxpress.passes.trainable import find_parts, write_back
from fxpress.passes.training import TrainingResult, fine_tune
from fxpress.passes.training_options import Precision, TrainingOptions

from ..checks import assert_same
from ..tiny import randn, tokens

FAST = TrainingOptions(steps=12, lr=1e-2, evaluate_every=4)


def pruned(program: Program) -> Program:
    return run_pipeline(program, [PruneMagnitude(sparsity=0.5, untie=True)], Context()).program


def data(program: Program, count: int = 6, label: Callable[[int], Any] | None = None) -> tuple[Example, ...]:
    """Batches of the example's size; labelled where `label` says with what."""
    (like,) = program.inputs.leaves
    rows, columns = like.shape[0], like.shape[-1]
    batches = [randn(*like.shape, seed=i) if like.is_floating_point() else tokens(rows, columns, 24, seed=i) for i in range(count)]
    return as_examples([Labelled(b, label(i)) if label else b for i, b in enumerate(batches)], program.inputs)


def tune(program: Program, options: TrainingOptions = FAST, **context: Any) -> TrainingResult:
    """Fine-tune the pruned program against itself before pruning."""
    return fine_tune(pruned(program), program, context.pop("data", None) or data(program), options, Context(**context))


@pytest.mark.parametrize("name", ["mlp", "conv", "embedding", "repeated"])
def test_distillation_lowers_the_held_out_loss_and_changes_neither_program(captured: Callable[[str], Program], name: str) -> None:
    teacher, student = captured(name), pruned(captured(name))
    before = [{n: t.detach().clone() for n, t in named_tensors(p.graph_module)} for p in (teacher, student)]
    result = fine_tune(student, teacher, data(teacher), FAST, Context())
    assert result.after < result.before and result.steps == 12 and result.tensors
    assert_same([{n: t.detach() for n, t in named_tensors(p.graph_module)} for p in (teacher, student)], before)
    assert all(t.grad is None for p in (teacher, student) for _, t in named_tensors(p.graph_module))


def test_same_seed_same_weights_and_another_seed_others(captured: Callable[[str], Program]) -> None:
    state = torch.get_rng_state()
    one, two, other = (tune(captured("mlp"), seed=s) for s in (5, 5, 6))
    assert_same(one.tensors, two.tensors)
    assert not torch.equal(one.tensors["up.weight"], other.tensors["up.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_of_the_loss_come_from_the_seed(captured: Callable[[str], Program]) -> None:
    def noisy(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target + torch.rand(())).square().mean()

    examples = data(captured("mlp"), label=lambda _: torch.ones(4, 6))
    torch.manual_seed(1)
    one = fine_tune(captured("mlp"), None, examples, FAST, Context(loss=noisy))
    torch.manual_seed(2)
    assert_same(fine_tune(captured("mlp"), None, examples, FAST, Context(loss=noisy)).tensors, one.tensors)


def test_the_rate_follows_the_schedule(captured: Callable[[str], Program]) -> None:
    options = replace(FAST, steps=2, lr=0.03, warmup=0.9)  # rates 0.01 and 0.02: Adam's first steps are as long as the rate
    program = captured("mlp")
    result = fine_tune(program, None, data(program, 1, label=lambda _: torch.ones(4, 6)), options, Context(loss=lambda o, t: (o - t).square().mean()))
    moved = max(float((new - get_tensor(program.graph_module, name)).detach().abs().max()) for name, new in result.tensors.items())
    assert 0.02 < moved < 0.0301


def test_names_of_one_tensor_are_trained_as_one(captured: Callable[[str], Program]) -> None:
    teacher = captured("repeated")
    student = run_pipeline(teacher, [QuantizeRtn(bits=1, only=("step",))], Context()).program
    last = student.sites()[-1]
    set_tensor(student.graph_module, "other.weight", get_tensor(student.graph_module, last.tensors[0]), parameter=True)
    with student.graph.inserting_before(last.node):
        last.node.update_arg(1, student.graph.get_attr("other.weight"))
    student.graph_module.recompile()
    assert student.sites()[1].tied and student.sites()[1].tensors != student.sites()[2].tensors
    result = fine_tune(student, teacher, data(teacher), replace(FAST, lr=1e-3), Context())
    write_back(student, find_parts(student)[0], result.tensors, "test", "why")
    one, other = (get_tensor(student.graph_module, n) for n in (last.tensors[0], "other.weight"))
    assert len(result.tensors) == 2 and torch.equal(one, other) and one.data_ptr() == other.data_ptr()
    (held,) = split(data(teacher), FAST.held_out, Context().generator())[1]
    found = relative_error(student.run_inputs(held.call), teacher.run_inputs(held.call))
    assert float(found) == pytest.approx(result.after, rel=1e-5)  # the graph with both names is what was trained


def test_accumulation_takes_several_batches_a_step(captured: Callable[[str], Program]) -> None:
    losses: list[float] = []

    def square(outputs: Tensor, target: Tensor) -> Tensor:
        losses.append(float((outputs.detach() - target).square().mean()))
        return (outputs - target).square().mean()

    examples = data(captured("mlp"), 1, label=lambda _: torch.ones(4, 6))
    result = fine_tune(captured("mlp"), None, examples, replace(FAST, steps=2, accumulate=3), Context(loss=square))
    start, *steps, end = losses
    assert [len(set(steps[:3])), len(set(steps[3:]))] == [1, 1] and start == steps[0] > steps[3] > end
    assert result.after == pytest.approx(end) and len(steps) == 6


def test_task_loss_with_labels_of_ones_own(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    seen: list[tuple[int, ...]] = []

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        seen.append(tuple(target.shape))
        return (outputs - target).square().mean()

    examples = data(program, label=lambda i: torch.full((4, 6), float(i % 2)))
    result = fine_tune(program, None, examples, FAST, Context(loss=loss))
    assert result.after < result.before and set(seen) == {(4, 6)}


def test_classification_and_next_token_need_no_loss_function(captured: Callable[[str], Program]) -> None:
    labels = data(captured("conv"), label=lambda i: torch.tensor([i % 5, 1]))
    for objective in (Objective.AUTO, Objective.TASK, Objective.BOTH):
        assert tune(captured("conv"), replace(FAST, objective=objective), data=labels).history
    language = tune(captured("embedding"), replace(FAST, objective=Objective.TASK, steps=30))
    assert math.isfinite(language.before) and language.history


def test_bf16_trains_float32_weights(captured: Callable[[str], Program]) -> None:
    result = tune(captured("mlp"), replace(FAST, dtype=Precision.BF16))
    assert result.after < result.before and result.tensors["up.weight"].dtype == torch.float32
    exact = tune(captured("mlp"))
    assert exact.before == result.before and not torch.equal(exact.tensors["up.weight"], result.tensors["up.weight"])


@pytest.mark.parametrize("precision", list(Precision))
def test_gradients_pass_through_compressed_sites(captured: Callable[[str], Program], precision: Precision) -> None:
    teacher = captured("conv")
    student = run_pipeline(teacher, [QuantizeRtn(bits=3, only=("conv2", "head"))], Context()).program
    result = fine_tune(student, teacher, data(teacher), replace(FAST, dtype=precision), Context())
    assert result.after < result.before and {n.partition(".")[0] for n in result.tensors} == {"conv1", "bn1", "bn2"}


def test_patience_stops_and_keeps_the_best(captured: Callable[[str], Program]) -> None:
    options = replace(FAST, steps=400, lr=3.0, clip=1e6, warmup=0.0, evaluate_every=1, patience=3)
    result = tune(captured("mlp"), options)
    assert result.steps == 3 and not result.tensors and result.after == result.before
    assert result.notes[1] == "stopped early: 3 evaluations without a better one" and result.notes[-1].startswith("training never beat the start")
    assert "2 evaluations above the start: training went back to the best weights, with a quarter of lr=3 each" in result.notes


def test_a_loss_that_is_no_longer_finite_stops_and_restores_the_best(captured: Callable[[str], Program]) -> None:
    calls = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (outputs - target).square().mean() * (math.nan if calls == 8 else 1.0)

    examples = data(captured("mlp"), 2, label=lambda _: torch.ones(4, 6))
    result = fine_tune(captured("mlp"), None, examples, replace(FAST, evaluate_every=1), Context(loss=loss))
    assert result.steps == 4 and len(result.history) == 4 and result.tensors
    assert "step 4 gave loss nan; a smaller lr may help" in result.notes[1]
    assert all(torch.isfinite(t).all() for t in result.tensors.values())


def test_nothing_to_recover(captured: Callable[[str], Program]) -> None:
    result = fine_tune(captured("mlp"), captured("mlp"), data(captured("mlp")), FAST, Context())
    assert result.steps == 0 and not result.tensors and "nothing to recover" in result.notes[1]


def test_one_batch_serves_as_both(captured: Callable[[str], Program]) -> None:
    result = tune(captured("mlp"), data=data(captured("mlp"), 1))
    assert result.after < result.before and "one batch, nothing held out" in result.notes[0]


def test_refusals(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    some = data(program)

    def refuse(message: str, options: TrainingOptions = FAST, loss: Any = None, examples: Any = some, teacher: Any = program) -> None:
        with pytest.raises(TrainingError, match=message):
            fine_tune(pruned(program), teacher, examples, options, Context(loss=loss))

    labelled = data(program, label=lambda _: torch.ones(4, 6))
    refuse("training batch 0: objective=task needs a target", replace(FAST, objective=Objective.TASK))
    refuse("training batch 0: objective=task needs a target", teacher=None)
    refuse(r"training batch 0: its target is a torch\.float32 tensor", examples=labelled)
    refuse("objective=distill needs the original program", replace(FAST, objective=Objective.DISTILL), teacher=None)
    refuse("the loss is nan before the first step", loss=lambda out, target: out.sum() * math.nan, examples=labelled)
    refuse("depends on no trained tensor", replace(FAST, objective=Objective.TASK), lambda out, target: torch.ones(()), labelled)
    refuse("pattern 'nowhere' matches no trainable", replace(FAST, trainable=("nowhere",)))
    refuse(r"expected class indices \[4\]", examples=data(program, label=lambda _: torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize(("cache", "runs"), [(0, 14), (1, 3)])
def test_the_originals_outputs_are_kept_for_batches_seen_again(
    captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch, cache: int, runs: int
) -> None:
    teacher, calls = captured("mlp"), []
    student = pruned(teacher)

    class Counted(training.Teacher):
        def __init__(self, program: Program, taps: Any, limit: int) -> None:
            super().__init__(program, taps, limit)
            run = self._run
            self._run = lambda call: calls.append(call) or run(call)  # type: ignore[assignment,func-returns-value]

    plain = fine_tune(student, teacher, data(teacher, 3), replace(FAST, steps=12, evaluate_every=12), Context())
    monkeypatch.setattr(training, "Teacher", Counted)
    counted = fine_tune(student, teacher, data(teacher, 3), replace(FAST, steps=12, evaluate_every=12, cache=cache), Context())
    assert len(calls) == runs  # 12 steps and 2 evaluations, or each of the 3 batches once
    assert_same(dict(counted.tensors), dict(plain.tensors))
