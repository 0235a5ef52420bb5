"""`fxpress.optimize`: capture, passes, result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from ..ir.capture import capture
from ..ir.program import Program
from ..passes.base import Pass
from ..passes.calibrate import as_calls
from ..passes.checkpoint import Checkpoint, fingerprint
from ..passes.context import Context
from ..passes.estimate import DryRun
from ..passes.estimate import dry_run as estimate
from ..passes.examples import as_examples
from ..passes.losses import Loss
from ..passes.pipeline import run_pipeline
from ..passes.progress import spinner
from ..passes.recipe import Recipe, as_recipe
from .result import Result

Passes = Recipe | Path | str | Pass | Mapping[str, Any] | Sequence[Any]


@overload
def optimize(
    model: nn.Module | torch.export.ExportedProgram | Program, passes: Passes, *, example_inputs: Any = ..., dynamic_shapes: Any = ...,
    calibration: Iterable[Any] | None = ..., training: Iterable[Any] | None = ..., loss: Loss | None = ...,
    seed: int = ..., progress: bool = ..., checkpoint_dir: str | Path | None = ..., dry_run: Literal[False] = ...,
) -> Result: ...  # fmt: skip
@overload
def optimize(
    model: nn.Module | torch.export.ExportedProgram | Program, passes: Passes, *, example_inputs: Any = ..., dynamic_shapes: Any = ...,
    calibration: Iterable[Any] | None = ..., training: Iterable[Any] | None = ..., loss: Loss | None = ...,
    seed: int = ..., progress: bool = ..., checkpoint_dir: str | Path | None = ..., dry_run: Literal[True],
) -> DryRun: ...  # fmt: skip


def optimize(
    model: nn.Module | torch.export.ExportedProgram | Program,
    passes: Passes,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    training: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint_dir: str | Path | None = None,
    dry_run: bool = False,
) -> Result | DryRun:
    """Compress `model` by `passes` and return a `Result`; the model itself is left as it is.

    Args:
        model: an nn.Module that torch.export accepts, an ExportedProgram, or a `Program` captured earlier.
        passes: pass objects, text specs such as `"quantize_rtn{bits=4,group_size=64}"`, a `Recipe`, or the path of a YAML recipe.
        example_inputs: tuple of positional inputs, dict of keyword inputs, or one tensor; not needed for an exported or captured program.
        dynamic_shapes: axes that may vary, as in `torch.export.export`.
        calibration: batches shaped like `example_inputs`, for passes that need data (GPTQ, Wanda).
        training: batches shaped like `example_inputs`, or `Labelled(inputs, target)`, for passes that train; the calibration batches if left out.
        loss: `loss(outputs, target) -> scalar` for labelled batches; cross entropy for class indices if left out.
        seed: for passes that draw random numbers; a recipe's own seed wins.
        progress: show progress bars when standard error is a terminal.
        checkpoint_dir: folder to resume from after a kill; refused when it belongs to another run.
        dry_run: return a `DryRun` (plan, legality, expected bytes, time and memory) instead of running.

    Raises:
        FxpressError: one of its kinds, saying what, where, expected, got, and the way out.
    """
    recipe = as_recipe(passes)
    with spinner("capturing the model", enabled=progress):
        program = model if isinstance(model, Program) else capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    calls, examples = as_calls(calibration, program.inputs), as_examples(training, program.inputs)
    seed = seed if recipe.seed is None else recipe.seed
    checkpoint = None
    if checkpoint_dir is not None and not dry_run:
        checkpoint = Checkpoint(Path(checkpoint_dir), fingerprint(program, recipe.specs, calls, seed, examples))
    ctx = Context(calibration=calls, training=examples, loss=loss, seed=seed, progress=progress, checkpoint=checkpoint)
    if dry_run:
        return estimate(program, recipe.passes, ctx)
    outcome = run_pipeline(program, recipe.passes, ctx)
    return Result(original=program, program=outcome.program, reports=outcome.reports, recipe=Recipe(recipe.passes, seed))


def load(folder: str | Path) -> Result:
    """Load what `Result.save` wrote. No code from the folder is run; its `original` is None, so `diff` and `attach` are not available.

    Raises `ArtifactError` when a file is missing, truncated, tampered with, or written by a newer fxpress.
    """
    from .artifact import load as load_artifact

    loaded = load_artifact(folder)
    return Result(program=loaded.program, reports=loaded.reports, recipe=loaded.recipe, bytes_before=loaded.manifest.bytes_before, notes=loaded.notes)
