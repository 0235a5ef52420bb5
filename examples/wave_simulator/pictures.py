"""PNG pictures: held-out losses of training runs, and a rollout beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...ir.errors import MissingExtraError
from ...ir.files import atomic_file

SHOWN = (1, 5, 15, 25)


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Held-out loss by training step, one line a net."""
    figure = _figure(6, 4)
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="training step", ylabel="held-out mean squared error", yscale="log", title="Training")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_rollout(truth: Tensor, predictions: Mapping[str, Tensor], path: Path, shown: Sequence[int] = SHOWN) -> None:
    """One trajectory `[steps, H, W]`: the truth, every prediction, and its error, at some of the steps; one colour scale for all fields, one for all errors."""
    shown = [s for s in shown if s <= len(truth)]
    steps = [s - 1 for s in shown]
    size = float(truth.abs().max())
    worst = min(size, max(float((p - truth)[steps].abs().max()) for p in predictions.values()))
    fields = [("truth", truth, size)]
    for name, field in predictions.items():
        fields += [(name, field, size), (f"{name}: error", field - truth, worst)]
    figure = _figure(2.1 * len(shown) + 1, 2.1 * len(fields))
    grid = figure.subplots(len(fields), len(shown), squeeze=False)
    for line, (name, field, scale) in zip(grid, fields, strict=True):
        for axes, step in zip(line, shown, strict=True):
            picture = axes.imshow(field[step - 1].T, origin="lower", cmap="RdBu_r", vmin=-scale, vmax=scale)
            axes.set(xticks=[], yticks=[], title=f"step {step}" if name == "truth" else "")
        line[0].set_ylabel(name)
        figure.colorbar(picture, ax=list(line), shrink=0.8)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing waves") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)
