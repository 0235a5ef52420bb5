"""`fxpress demo wave`: a net that steps the wave equation, dense and made of one-way filters before training; trained alike, run in ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ...ir.axes import analyze_axes
from ...ir.files import atomic_file
from ...passes.examples import Labelled
from ...passes.progress import spinner
from ...runtime.latency import Latency, latency
from ...runtime.onnx_session import tensor_function
from ...runtime.optimize import optimize
from ...runtime.result import Result
from .data import Waves, batches, simulate
from .nets import StepNet, relative_error, rollout, rollout_error
from .pictures import draw_curves, draw_rollout

BEFORE = {"dense": [], "one-way": ["oneway_conv{start=fresh,form=composed}"]}
AFTER = {"dense": [], "one-way": ["oneway_form{to=factored}"]}
BITS = {"one-way, 8 bits": ("one-way", "quantize_rtn{bits=8}")}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size of a run: trajectories for training and test, training steps of `batch` samples, and how far rollouts go."""

    nodes: int = 33
    trajectories: tuple[int, int] = (100, 20)
    steps: int = 800
    batch: int = 16
    lr: float = 1e-2
    noise: float = 0.05
    horizon: int = 25
    seed: int = 0

    @property
    def training(self) -> str:
        """The training pass."""
        return training_pass(self.steps, self.lr, 20)

    def waves(self) -> tuple[Waves, Waves]:
        """Trajectories for training, and others for the test."""
        training, test = simulate(sum(self.trajectories), nodes=self.nodes, seed=self.seed).split(*self.trajectories)
        return training, test


QUICK = Settings(nodes=17, trajectories=(4, 2), steps=20, batch=4, horizon=10)


def mean_squared_error(found: Tensor, target: Tensor) -> Tensor:
    """The training loss."""
    return (found - target).square().mean()


def run_wave(out: Path, *, quick: bool = False) -> None:
    """Do the whole job and write ONNX files, pictures and report.md into `out`."""
    console, began, settings = Console(), time.perf_counter(), QUICK if quick else Settings()
    out.mkdir(parents=True, exist_ok=True)
    with spinner("simulating waves with finite elements"):
        training, test = settings.waves()
    results = {name: _trained(name, training, settings, console) for name in BEFORE}
    results |= {name: optimize(results[plain].program, spec) for name, (plain, spec) in BITS.items()}
    with spinner("exporting and checking"):
        files = {name: out / f"{name.replace(', ', '-').replace(' ', '-')}.onnx" for name in results}
        for name, path in files.items():
            results[name].export_onnx(path)
    with spinner("measuring all of them in ONNX Runtime"):
        table = _measured(results, files, training, test, settings)
    _draw(results, files, test, settings, out)
    console.print(_shown(table))
    _write_report(out / "report.md", table, results)
    names = ", ".join(p.name for p in files.values())
    console.print(f"written to {out}: {names}, curves.png, rollout.png, report.md ({time.perf_counter() - began:.0f} s)", markup=False)


def _trained(name: str, waves: Waves, settings: Settings, console: Console) -> Result:
    """One net from scratch, on the same batches as the others."""
    recipe = [*BEFORE[name], settings.training, *AFTER[name]]
    console.print(f"{name}: {' -> '.join(recipe)}", markup=False, soft_wrap=True)
    data = batches(waves.steps(), size=settings.batch, count=settings.steps, noise=settings.noise, seed=settings.seed)
    return trained(StepNet, recipe, data, seed=settings.seed, progress=True)


def trained(net: Callable[[], nn.Module], recipe: Sequence[str], data: Sequence[Labelled], *, seed: int, progress: bool = False) -> Result:
    """A net made and put through a recipe that trains it, all at one seed."""
    torch.manual_seed(seed)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=1024)}}
    given: dict[str, Any] = {"example_inputs": data[0].inputs, "dynamic_shapes": shapes, "training": data}
    return optimize(net().eval(), recipe, loss=mean_squared_error, seed=seed, progress=progress, **given)


def training_pass(steps: int, lr: float, evaluations: int) -> str:
    """From scratch, on labels, to the last step."""
    return f"recover{{objective=task,steps={steps},lr={lr},held_out=0.02,evaluate_every={max(1, steps // evaluations)},patience=1000}}"


def _measured(results: dict[str, Result], files: dict[str, Path], training: Waves, test: Waves, settings: Settings) -> dict[str, dict[str, str]]:
    runs = {name: tensor_function(path, threads=1) for name, path in files.items()}
    start, truth = test.u[:, :2], test.u[:, 2 : 2 + settings.horizon]
    speed: Latency = latency({name: partial(run, start[:1]) for name, run in runs.items()}, rounds=100)
    seen = tuple(part[: len(test.u) * 10] for part in training.steps())
    table = {}
    for name, run in runs.items():
        program = results[BITS.get(name, (name,))[0]].program
        table[name] = {
            "parameters": f"{program.parameters:,}",
            "multiply-adds a step": f"{analyze_axes(program).macs() / len(program.inputs.args[0]) / 1e6:.1f} M",
            "bytes of the ONNX file": f"{files[name].stat().st_size:,}",
            "one step, error on training waves": f"{100 * relative_error(run, (seen[0], seen[1])):.2f} %",
            "one step, error on new waves": f"{100 * relative_error(run, test.steps()):.2f} %",
            f"{settings.horizon} steps, error on new waves": f"{100 * rollout_error(run, start, truth):.1f} %",
            "milliseconds a step, one thread": f"{1000 * speed[name].seconds.median:.2f} ({1 / speed[name].ratio.median:.2f}x)",
        }
    return table


def _draw(results: dict[str, Result], files: dict[str, Path], test: Waves, settings: Settings, out: Path) -> None:
    draw_curves({name: next(r.history for r in results[name].reports if r.history) for name in BEFORE}, out / "curves.png")
    found = {name: rollout(tensor_function(files[name], threads=1), test.u[:1, :2], settings.horizon)[0] for name in BEFORE}
    draw_rollout(test.u[0, 2 : 2 + settings.horizon], found, out / "rollout.png")


def _shown(table: dict[str, dict[str, str]]) -> Table:
    shown = Table("wave equation, one run", *table, title="dense and one-way", title_justify="left")
    for row in next(iter(table.values())):
        shown.add_row(row, *(column[row] for column in table.values()))
    return shown


def _write_report(path: Path, table: dict[str, dict[str, str]], results: dict[str, Any]) -> None:
    lines = ["# A wave simulator, dense and one-way", "", f"| | {' | '.join(table)} |", "|---" * (1 + len(table)) + "|"]
    lines += [f"| {row} | {' | '.join(column[row] for column in table.values())} |" for row in next(iter(table.values()))]
    for name, result in results.items():
        lines += ["", f"## {name}", "", "```", result.summary().rstrip(), "```"]
    lines += ["", "![training](curves.png)", "", "![rollout](rollout.png)", ""]
    with atomic_file(path) as scratch:
        scratch.write_text("\n".join(lines), encoding="utf-8")
