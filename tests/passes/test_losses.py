"""The losses against their formulas in double precision, and which of them counts where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ir.errors import TrainingError
from fxpress.ir.program import Program
from fxpress.passes.cross_entropy import cross_entropy
from fxpress.passes.divergence import divergence
from fxpress.passes.examples import Example
from fxpress.passes.losses import Criterion, Language, Objective, Outputs, find_language, relative_error, rows, stream_error
from fxpress.passes.tapped import Reply

from ..tiny import randn


def reply(*leaves: Tensor, hidden: tuple[Tensor, ...] = ()) -> Reply:
    return Reply(leaves, leaves[0], hidden)


def example(target: Any = None, **kwargs: Any) -> Example:
    return Example(((), kwargs), target)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_the_published_formula(temperature: float) -> None:
    student, teacher = randn(2, 3, 7), randn(2, 3, 7, seed=1)
    p, q = ((t.double() / temperature).softmax(-1) for t in (teacher, student))
    want = (p * (p / q).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(divergence(student, teacher, temperature).double(), want, rtol=1e-5, atol=1e-7)
    assert divergence(student, student).abs() < 1e-6


def test_relative_error_is_over_the_variance() -> None:
    student, teacher = randn(5, 4), randn(5, 4, seed=1)
    want = (student - teacher).double().square().mean() / teacher.double().var(unbiased=False)
    torch.testing.assert_close(relative_error(student, teacher).double(), want, rtol=1e-5, atol=0)
    assert torch.isfinite(relative_error(student, torch.ones(5, 4)))


def test_rows_of_masked_positions_do_not_count() -> None:
    keep = torch.tensor([[True, False], [True, True]])
    assert rows(randn(2, 2, 4), keep).shape == (3, 4)
    assert rows(randn(2, 4), keep).shape == (2, 4) and rows(randn(3, 2, 4), keep).shape == (3, 2, 4)
    student, teacher = randn(2, 2, 4), randn(2, 2, 4, seed=1)
    mask = {"attention_mask": keep.long()}
    criterion = Criterion(outputs=Outputs.LOGITS, hidden=1.0)
    found = criterion(example(**mask), [], reply(student, hidden=(student,)), reply(teacher, hidden=(teacher,)))
    student[0, 1] = 1000.0
    assert found == criterion(example(**mask), [], reply(student, hidden=(student,)), reply(teacher, hidden=(teacher,)))


LANGUAGE = {name: Language(0, 0) for name in ("embedding", "llama", "llama_tied", "opt", "gpt2")}


@pytest.mark.parametrize("name", ["mlp", "conv", "bert", "vit", *LANGUAGE])
def test_language_models_are_recognised(captured: Callable[[str], Program], name: str) -> None:
    assert find_language(captured(name)) == LANGUAGE.get(name)


def test_how_outputs_are_compared() -> None:
    student, teacher = reply(randn(4, 3)), reply(randn(4, 3, seed=1))
    kl, values = divergence(student.outputs, teacher.outputs), relative_error(student.outputs, teacher.outputs)
    labels = torch.tensor([0, 1, 2, 0])
    assert Criterion()(example(), [], student, teacher) == values
    assert Criterion(outputs=Outputs.LOGITS)(example(), [], student, teacher) == kl
    assert Criterion(objective=Objective.DISTILL)(example(labels), [], student, teacher) == kl
    assert Criterion()(example(labels), [], student, teacher) == kl + cross_entropy(student.outputs, labels)
    assert Criterion(objective=Objective.TASK)(example(labels), [], student, None) == cross_entropy(student.outputs, labels)
    assert Criterion(language=Language(0, 0))(example(), [], reply(randn(2, 3, 5)), reply(randn(2, 3, 5, seed=1))) == divergence(
        randn(2, 3, 5), randn(2, 3, 5, seed=1)
    )


def test_hidden_states_count_with_their_weight() -> None:
    student, teacher = reply(randn(4, 3), hidden=(randn(2, 2),)), reply(randn(4, 3, seed=1), hidden=(randn(2, 2, seed=1),))
    with_, without = (Criterion(hidden=h)(example(), [], student, teacher) for h in (0.5, 0.0))
    torch.testing.assert_close(with_ - without, 0.5 * relative_error(student.hidden[0], teacher.hidden[0]))


def test_reasons_for_batches_without_a_loss() -> None:
    task, both = Criterion(objective=Objective.TASK), Criterion(objective=Objective.BOTH)
    assert Criterion().why_not(example()) is None and task.why_not(example(torch.tensor([1]))) is None
    assert "needs a target" in str(task.why_not(example())) and "needs a target" in str(both.why_not(example()))
    assert "its target is a torch.float32 tensor" in str(Criterion().why_not(example(torch.ones(2))))
    assert "its target is a list" in str(Criterion().why_not(example([1])))
    assert Criterion(loss=F.mse_loss).why_not(example(torch.ones(2))) is None
    assert Criterion(objective=Objective.TASK, language=Language(0, 0)).why_not(example()) is None


def test_refusals_while_training() -> None:
    with pytest.raises(TrainingError, match=r"expected a scalar tensor, got \[4\]"):
        Criterion(loss=lambda out, _: out)(example(torch.ones(4)), [], reply(randn(4)), None)
    with pytest.raises(TrainingError, match="expected a scalar tensor, got float"):
        Criterion(loss=lambda out, _: 1.0)(example(torch.ones(4)), [], reply(randn(4)), None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TrainingError, match=r"output 0 is \[4, 3\], the original's is \[4, 2\]"):
        Criterion()(example(), [], reply(randn(4, 3)), reply(randn(4, 2)))
    with pytest.raises(TrainingError, match="same float outputs"):
        Criterion()(example(), [], reply(torch.tensor([1])), reply(torch.tensor([1])))


def test_stream_error_counts_every_position_alike_however_large_it_is() -> None:
    teacher = randn(2, 5, 8) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1000.0]).view(1, 5, 1)
    student = teacher + 0.1 * randn(2, 5, 8, seed=1) * teacher.square().mean(-1, keepdim=True).sqrt()
    exact, other = student.double(), teacher.double()
    want = ((exact - other).square().sum(-1) / other.square().sum(-1)).mean()
    torch.testing.assert_close(stream_error(student, teacher).double(), want, rtol=1e-5, atol=0)
    moved = student.clone()
    moved[:, 0] = teacher[:, 0]  # one small position made right: a fifth of the loss, next to nothing of `relative_error`
    assert 0.5 * want < stream_error(moved, teacher) < 0.95 * want
    assert relative_error(moved, teacher) > 0.999 * relative_error(student, teacher)


def test_stream_error_of_images_and_of_positions_that_are_nothing() -> None:
    image, other = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    want = ((image - other).double().square().sum((1, 2, 3)) / other.double().square().sum((1, 2, 3))).mean()
    torch.testing.assert_close(stream_error(image, other).double(), want, rtol=1e-5, atol=0)
    empty = randn(1, 4, 8)
    empty[0, 0] = 0
    assert stream_error(empty + 0.01, empty) < 1 and stream_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
