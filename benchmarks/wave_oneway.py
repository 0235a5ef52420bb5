"""Nets that simulate waves, made of one-way filters before training, against dense ones and against other small convolutions, trained alike.

    python benchmarks/wave_oneway.py [--task step|field] [--seeds 3] [--steps 800] [--rows one-way] [--seconds 3600]
    python benchmarks/wave_oneway.py --task step --costs    (when all rows are there: ONNX Runtime, training steps, memory; alone on the machine)

`step`: six 3 x 3 convolutions of width 32 predict the next frame of the wave equation from the last two, judged over one step and fed back over 25.
`field`: a U-Net (16, 32, 64) predicts frame 12 from the first. Inner convolutions are exchanged, the first and the last stay. Trajectories are split whole.
Rows go to benchmarks/results/wave_oneway_TASK.json one by one, one for each seed; a run that dies goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from pass_memory import status
from torch import Tensor, nn

import fxpress
from fxpress.examples.wave_simulator.data import Waves, batches, simulate
from fxpress.examples.wave_simulator.demo import mean_squared_error, trained, training_pass
from fxpress.examples.wave_simulator.nets import Conv, StepNet, UNet, dense, relative_error, rollout_error
from fxpress.ir.axes import analyze_axes
from fxpress.ir.program import Program
from fxpress.passes.examples import Labelled
from fxpress.runtime.latency import latency
from fxpress.runtime.onnx_session import tensor_function

RESULTS = Path(__file__).with_name("results")
NODES, BATCH, HORIZON, FRAME = 33, 16, 25, 12
RATES = {"step": (5e-3, 1e-2, 2e-2), "field": (2.5e-3, 5e-3, 1e-2, 2e-2)}  # learning rates of the first seed; the best one by held-out loss is every seed's
NOISE = {"step": 0.05, "field": 0.0}  # of the training inputs; without it rollouts explode
ONE_WAY = "oneway_conv{terms=%d,start=fresh,form=composed}"
FACTORED = "oneway_form{to=factored}"


@dataclass(frozen=True)
class Method:
    """A net's inner convolutions, its widths where they are not the usual ones, and passes before and after training."""

    conv: Conv = dense
    step: int = 32
    field: tuple[int, int, int] = (16, 32, 64)
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def net(self, task: str) -> nn.Module:
        """Untrained."""
        return StepNet(width=self.step, conv=self.conv) if task == "step" else UNet(widths=self.field, conv=self.conv)


def shared_terms(inputs: int, outputs: int) -> nn.Module:
    """Canonical polyadic form: three quarters as many terms as outputs, which all maps mix."""
    terms = 3 * outputs // 4
    along = [nn.Conv2d(terms, terms, k, padding=(k[0] // 2, k[1] // 2), groups=terms, bias=False) for k in ((3, 1), (1, 3))]
    return nn.Sequential(nn.Conv2d(inputs, terms, 1, bias=False), *along, nn.Conv2d(terms, outputs, 1))


def separable(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
    """Depthwise, then 1 x 1 (MobileNet)."""
    return nn.Sequential(nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False), nn.Conv2d(inputs, outputs, 1))


def wide(inputs: int, outputs: int) -> nn.Module:
    """A 5 x 5 convolution: as one-way filters hardly more than 3 x 3."""
    return nn.Conv2d(inputs, outputs, 5, padding=2)


METHODS = {
    "dense": Method(),
    "one-way, 1 term": Method(before=(ONE_WAY % 1,), after=(FACTORED,)),
    "one-way, 1 term, wider": Method(step=40, field=(20, 40, 80), before=(ONE_WAY % 1,), after=(FACTORED,)),
    "one-way, 2 terms": Method(before=(ONE_WAY % 2,), after=(FACTORED,)),
    "one-way, 1 term, 5 x 5": Method(conv=wide, before=("oneway_conv{terms=1,start=fresh}",)),  # trains faster filter by filter
    "one-way, shared terms (CP)": Method(conv=shared_terms),
    "depthwise-separable": Method(conv=separable),
    "depthwise-separable, 5 x 5": Method(conv=partial(separable, kernel=5)),
    "dense, narrow": Method(step=12, field=(6, 12, 24)),  # about as many parameters as with one term
}


def waves(task: str) -> tuple[Waves, Waves]:
    """Trajectories for training and for the test."""
    training, test = simulate(180 if task == "step" else 440, nodes=NODES, frames=50 if task == "step" else FRAME + 1).split(
        *((160, 20) if task == "step" else (400, 40))
    )
    return training, test


def samples(task: str, data: Waves) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    return data.steps() if task == "step" else data.fields(FRAME)


def optimized(method: Method, task: str, data: list[Labelled], seed: int, rate: float = 5e-3) -> fxpress.Result:
    """From a fresh net to what runs."""
    return trained(partial(method.net, task), [*method.before, training_pass(len(data), rate, 12), *method.after], data, seed=seed)


def one_sample(task: str, count: int) -> list[Labelled]:
    """Batches for timing: the same sample over and over."""
    x, y = samples(task, simulate(2, nodes=NODES, frames=FRAME + 1))
    return [Labelled((x[:1].expand(BATCH, -1, -1, -1),), y[:1].expand(BATCH, -1, -1, -1))] * count


def train(name: str, task: str, seed: int, steps: int, rate: float, training: Waves, test: Waves) -> dict[str, Any]:
    """One row: errors after training."""
    began = time.process_time()
    result = optimized(METHODS[name], task, batches(samples(task, training), size=BATCH, count=steps, noise=NOISE[task], seed=seed), seed, rate)
    program, seconds = result.program, time.process_time() - began
    seen = tuple(t[:: max(1, len(t) // 1000)] for t in samples(task, training))
    row = {"method": name, "seed": seed, "steps": steps, "rate": rate, "parameters": program.parameters, "cpu_seconds": seconds}
    row |= {"macs": analyze_axes(program).macs() / BATCH, "train_error": relative_error(program.run, (seen[0], seen[1]))}
    row |= {"test_error": relative_error(program.run, samples(task, test))}
    if task == "step":
        row["rollout_error"] = rollout_error(program.run, test.u[:, :2], test.u[:, 2 : 2 + HORIZON])
    return row | {"history": next(r.history for r in result.reports if r.history)}


def costs(task: str) -> list[dict[str, Any]]:
    """Milliseconds in ONNX Runtime and CPU seconds of a training step (one thread, alternating), and peak memory of training in a fresh process."""
    data = one_sample(task, 1)
    (x,) = data[0].inputs
    found: dict[str, dict[str, Any]] = {name: {"method": name} for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, method in METHODS.items():
            path = Path(folder) / f"{len(runs)}.onnx"
            optimized(method, task, data[:1], 0).export_onnx(path)
            runs[name] = tensor_function(path, threads=1)
            found[name]["onnx_bytes"] = path.stat().st_size
        for count in (1, 32):
            timed = latency({n: partial(run, x[:1].expand(count, -1, -1, -1).contiguous()) for n, run in runs.items()}, rounds=200 if count == 1 else 30)
            for name in METHODS:
                found[name][f"onnx_{count}"] = {"ms": 1000 * timed[name].seconds.median, "times_faster": 1 / timed[name].ratio.median}
    steps = {n: training_step(trained(partial(m.net, task), m.before, data, seed=0).program, data[0]) for n, m in METHODS.items()}
    timed = latency(steps, rounds=30, clock=time.process_time)
    for name in METHODS:
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--task", task, "--memory", name], check=True, capture_output=True, text=True)
        found[name] |= {
            "step_seconds": timed[name].seconds.median,
            "steps_faster": 1 / timed[name].ratio.median,
            "peak_mib": float(done.stdout.splitlines()[-1]),
        }
        print(json.dumps(found[name]), flush=True)
    return list(found.values())


def training_step(program: Program, data: Labelled) -> Callable[[], None]:
    """One step of Adam on a batch, as a function to time."""
    module = program.graph_module.requires_grad_()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        mean_squared_error(module(*data.inputs), data.target).backward()
        optimizer.step()

    return step


def peak_memory(name: str, task: str) -> float:
    """MiB that five training steps take above what the process held after the first."""
    data = one_sample(task, 5)
    optimized(METHODS[name], task, data[:1], 0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    optimized(METHODS[name], task, data, 0)
    return (status("VmHWM") - before) / 2**20


def best_rate(rows: list[dict[str, Any]], name: str) -> float:
    """Of the first seed, by the lowest loss on batches held out of training."""
    mine = [r for r in rows if r["method"] == name and r["seed"] == 0]
    return float(min(mine, key=lambda r: min(loss for _, loss in r["history"]))["rate"])


def table(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    """Medians over the seeds (a rollout may explode), and their range."""
    lines = ["| net | parameters | MACs | test error | 25 steps | test over training |", "|---" * 6 + "|"]
    for name in METHODS:
        mine = [r for r in rows if r["method"] == name and r["rate"] == best_rate(rows, name)]
        if mine:
            gap = mean(r["test_error"] / r["train_error"] for r in mine)
            cells = [f"{mine[0]['parameters']:,}", f"{mine[0]['macs'] / 1e6:.1f} M", _spread(mine, "test_error"), _spread(mine, "rollout_error"), f"{gap:.2f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(json.dumps(m) for m in measured)])


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [100 * r[key] for r in rows if key in r]
    return f"{median(values):.2f} % ({min(values):.2f} to {max(values):.2f})" if values else "-"


def main() -> None:
    """Every row that the file does not hold yet, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("step", "field"), default="step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rows", nargs="*", default=[""], help="methods whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so many seconds")
    parser.add_argument("--costs", action="store_true", help="measure times and memory instead")
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, began, out = arguments.task, time.perf_counter(), RESULTS / f"wave_oneway_{arguments.task}.json"
    if arguments.memory:
        print(peak_memory(arguments.memory, task))
        return
    held: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": [], "costs": []}
    if arguments.costs:
        held["costs"] = costs(task)
        out.write_text(json.dumps(held, indent=1) + "\n")
    else:
        training, test = waves(task)
        jobs = [(seed, name, rate) for seed in range(arguments.seeds) for name in METHODS for rate in RATES[task] if any(r in name for r in arguments.rows)]
        for seed, name, rate in jobs:
            done = any((r["method"], r["seed"], r["steps"], r["rate"]) == (name, seed, arguments.steps, rate) for r in held["rows"])
            wanted = not done and (seed == 0 or rate == best_rate(held["rows"], name))
            if wanted and time.perf_counter() - began < arguments.seconds:
                held["rows"].append(train(name, task, seed, arguments.steps, rate, training, test))
                out.write_text(json.dumps(held, indent=1) + "\n")
                print({k: v for k, v in held["rows"][-1].items() if k != "history"}, flush=True)
    print(table(held["rows"], held["costs"]))


if __name__ == "__main__":
    main()
