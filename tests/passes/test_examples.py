"""Training data: checked like calibration data, targets kept, split at random but the same every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxpress.ir.errors import TrainingError
from fxpress.ir.program import Program
from fxpress.passes.context import Call, Context
from fxpress.passes.examples import Example, Labelled, as_examples, split, training_data

from ..tiny import randn


def test_targets_are_kept_and_dynamic_axes_may_vary(captured: Callable[[str], Program]) -> None:
    inputs = captured("mlp").inputs
    target = torch.tensor([1, 2, 0])
    plain, labelled = as_examples([randn(7, 12), Labelled((randn(3, 12),), target)], inputs)
    assert plain.target is None and plain.call[0][0].shape == (7, 12)
    assert labelled.target is target and labelled.call[0][0].shape == (3, 12)
    assert as_examples(None, inputs) == ()


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": ([], "training is empty"),
    "shape": ([randn(2, 12), randn(2, 5)], r"training batch 1: input 0: expected shape \[\*, 12\]"),
    "type": ([randn(2, 12).double()], "training batch 0: input 0: expected dtype"),
    "structure": ([(randn(2, 12), randn(2, 12))], "training batch 0: inputs: expected 1 positional"),
    "no input": (["text"], "training batch 0: example_inputs: expected a tensor"),
    "not finite": ([torch.full((2, 12), math.nan)], "training batch 0: holds NaN"),
    "no target": ([Labelled(randn(2, 12), None)], "training batch 0: Labelled without a target"),
    "target not finite": ([Labelled(randn(2, 12), {"a": torch.tensor([math.inf])})], "training batch 0: its target holds NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_batch_is_named(captured: Callable[[str], Program], name: str) -> None:
    batches, message = WRONG[name]
    with pytest.raises(TrainingError, match=message):
        as_examples(batches, captured("mlp").inputs)


def test_calibration_serves_when_there_is_no_training_data(captured: Callable[[str], Program]) -> None:
    call: Call = ((randn(2, 12),), {})
    assert training_data(Context(calibration=[call])) == (Example(call),)
    given = Example(call, torch.tensor([0, 1]))
    assert training_data(Context(calibration=[call], training=[given])) == (given,)
    with pytest.raises(TrainingError, match="needs data; pass training="):
        training_data(Context())


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.01, 1), (10, 0.2, 2), (3, 0.99, 2)])
def test_split_is_a_partition(count: int, fraction: float, held: int) -> None:
    examples = tuple(Example(((i,), {})) for i in range(count))
    training, held_out = split(examples, fraction, Context(seed=3).generator())
    assert len(held_out) == held and sorted(e.call[0][0] for e in training + held_out) == list(range(count))
    assert (training, held_out) == split(examples, fraction, Context(seed=3).generator())


def test_a_single_batch_is_both() -> None:
    examples = (Example(((1,), {})),)
    assert split(examples, 0.5, Context().generator()) == (examples, examples)
