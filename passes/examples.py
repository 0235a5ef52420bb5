"""Training data: calls, some with a target, checked against the captured inputs before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.errors import TrainingError
from ..ir.inputs import Inputs
from .calibrate import as_call
from .context import Call, Context

T = TypeVar("T")


@dataclass(frozen=True)
class Labelled:
    """A training batch with what the model should answer.

    `inputs` are shaped like `example_inputs`. `target` is whatever the loss given to `optimize` takes, or class indices `int64` of the shape of the
    first float output without its last axis.
    """

    inputs: Any
    target: Any


@dataclass(frozen=True)
class Example:
    """One checked batch: a call, and its target where it is labelled."""

    call: Call
    target: Any = None


def as_examples(training: Iterable[Any] | None, inputs: Inputs) -> tuple[Example, ...]:
    """Training batches, each like a calibration batch or a `Labelled`, checked against the captured inputs.

    Raises `TrainingError` naming the batch for a wrong structure, dtype or shape, for NaN and infinite values, and for a missing target.
    """
    if training is None:
        return ()
    examples = tuple(_as_example(f"training batch {i}", batch, inputs) for i, batch in enumerate(training))
    if not examples:
        raise TrainingError("training is empty; pass at least one batch shaped like example_inputs, or leave it out to train on the calibration batches")
    return examples


def _as_example(where: str, batch: Any, inputs: Inputs) -> Example:
    if not isinstance(batch, Labelled):
        return Example(as_call(where, batch, inputs, TrainingError))
    if batch.target is None:
        raise TrainingError(f"{where}: Labelled without a target; pass its inputs alone for a batch without one")
    for leaf in pytree.tree_leaves(batch.target):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise TrainingError(f"{where}: its target holds NaN or infinite values; clean the data")
    return Example(as_call(where, batch.inputs, inputs, TrainingError), inputs.placed(batch.target))


def training_data(ctx: Context) -> tuple[Example, ...]:
    """What a run trains on: its training batches, else its calibration batches without targets."""
    found = tuple(ctx.training) or tuple(Example(call) for call in ctx.calibration)
    if not found:
        raise TrainingError("this recipe trains and needs data; pass training=[batch, ...] (or calibration=) with batches shaped like example_inputs")
    return found


def split(examples: tuple[T, ...], fraction: float, generator: torch.Generator) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Training and held-out batches, drawn at random; a single batch serves as both."""
    if len(examples) < 2:
        return examples, examples
    held = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    order = torch.randperm(len(examples), generator=generator, device="cpu").tolist()
    return tuple(examples[i] for i in sorted(order[held:])), tuple(examples[i] for i in sorted(order[:held]))
