"""Half the multiply-adds of two Fashion-MNIST nets: fxpress' structured pruning and Torch-Pruning, recovered alike, and what ONNX Runtime gains.

    python benchmarks/train_fashion.py            (once; an hour on one core)
    pip install --no-deps torch-pruning==1.6.1    (the peer; not a dependency of fxpress)
    python benchmarks/structured_cnn.py [cnn] [resnet18] [--seeds 3 1] [--steps 300] [--fresh]

Torch-Pruning's ratio is bisected until its multiply-adds meet ours. All pruned nets are recovered by the `recover` pass on the same batches, at the
learning rate of three that does best for each on held-out images, and, as a check, by a plain PyTorch loop with batch norm live. Recoveries are kept
in the cache folder as they finish, so a run that was killed goes on where it was. Writes benchmarks/results/structured_cnn.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cnn_models import accuracy, load_trained
from recovery import Batch, Recovery, by_plain_loop, by_recover, labelled, recovery_data
from torch import nn
from torch_pruning_peer import macs, prune_to

import fxpress
from fxpress.ir.files import cache_dir
from fxpress.ir.program import Program
from fxpress.runtime.latency import latency
from fxpress.runtime.onnx_session import open_session
from fxpress.runtime.result import Result
from fxpress.runtime.zoo_images import fashion_mnist

RESULTS = Path(__file__).with_name("results") / "structured_cnn.json"
PRUNE = "prune_structured{macs=0.5,multiple_of=4}"
PEERS = {"Torch-Pruning GroupTaylor": "taylor", "Torch-Pruning GroupMagnitude": "magnitude"}  # ranked over the whole net, as ours
RATES = (1e-4, 3e-4, 1e-3)
BATCHES = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}}}


@dataclass
class Row:
    """One net under one method; accuracies in percent of the test images, one a seed after recovery.

    `prune_seconds` of Torch-Pruning hold its whole search for the ratio that meets the multiply-adds; `settings` are where that ended. `rates`: accuracy on the
    validation images by learning rate, which chose the rate.
    """

    net: str
    method: str
    macs: int
    parameters: int
    before: float
    prune_seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    rates: dict[float, float] = field(default_factory=dict)
    recovered: list[float] = field(default_factory=list)
    recover_seconds: list[float] = field(default_factory=list)
    plain_loop: float | None = None


def prune_all(model: nn.Module, dense: Program, data: list[Batch]) -> dict[str, tuple[Program, float, dict[str, Any]]]:
    """The pruned programs, the seconds each took and its settings; Torch-Pruning meets the multiply-adds that fxpress leaves."""
    x = data[0][0]
    began = time.perf_counter()
    ours = fxpress.optimize(dense, [PRUNE], calibration=[(x,) for x, _ in data], training=labelled(data)).program
    found: dict[str, tuple[Program, float, dict[str, Any]]] = {"fxpress": (ours, time.perf_counter() - began, {"spec": PRUNE})}
    for method, importance in PEERS.items():
        began = time.perf_counter()
        theirs, settings = prune_to(model, x, macs(ours, x), data, importance=importance, global_ranking=True)
        found[method] = (fxpress.capture(theirs, (x[:2],), **BATCHES), time.perf_counter() - began, settings)
    return found


def measure_net(name: str, seeds: int, settings: Recovery, kept: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of dense, fxpress and Torch-Pruning, and the latencies of their ONNX files."""
    model, _ = load_trained(name)
    images, labels = fashion_mnist("train")
    data = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 640, 64)]
    dense = fxpress.capture(model, (images[:2],), **BATCHES)
    pruned = prune_all(model, dense, data)
    programs = {"dense": dense, **{method: program for method, (program, *_) in pruned.items()}}
    rows = [row_of(name, method, program) for method, program in programs.items()]
    for row in rows[1:]:
        _, row.prune_seconds, row.settings = pruned[row.method]
        print(f"{name}, {row.method}: {row.macs / rows[0].macs:.3f} of the multiply-adds, {row.before:.2f} % before recovery", flush=True)
        recover_row(row, programs[row.method], dense, settings, seeds, kept)
    return rows, [{"net": name, **timing} for timing in onnx_latency(programs)]


def row_of(net: str, method: str, program: Program) -> Row:
    """What is known before any recovery."""
    x, y = fashion_mnist("test")
    weights = sum(p.numel() for p in program.graph_module.parameters())
    return Row(net=net, method=method, macs=macs(program, x), parameters=weights, before=accuracy(program, x, y))


def recover_row(row: Row, pruned: Program, dense: Program, settings: Recovery, seeds: int, kept: Path) -> None:
    """Recover by the pass, at the learning rate that did best on the validation images at the first seed; at that seed also by the plain loop."""

    def recovered(way: str, rate: float, seed: int) -> dict[str, float]:
        own = replace(settings, lr=rate)
        ways: dict[str, Callable[..., Any]] = {"recover": partial(by_recover, seed=seed), "plain loop": by_plain_loop}
        key = f"{row.net} {row.method} {way} seed {seed} {row.settings} {own} macs {row.macs} before {row.before}"
        return remembered(kept, key, lambda: _measure(lambda: ways[way](pruned, dense, recovery_data(own, seed), own)))

    row.rates = {rate: recovered("recover", rate, 0)["validation"] for rate in RATES}
    best = max(RATES, key=lambda rate: row.rates[rate])
    for seed in range(seeds):
        found = recovered("recover", best, seed)
        row.recovered.append(found["test"])
        row.recover_seconds.append(found["seconds"])
    row.plain_loop = recovered("plain loop", best, 0)["test"]


def _measure(recover: Callable[[], Any]) -> dict[str, float]:
    began = time.perf_counter()
    small = recover()
    seconds = time.perf_counter() - began
    return {"validation": accuracy(small, *fashion_mnist("validation")), "test": accuracy(small, *fashion_mnist("test")), "seconds": seconds}


def remembered(kept: Path, key: str, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What an earlier run found under this key, else what `work` finds."""
    found: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if key not in found:
        found[key] = work()
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{key}: {found[key]}", flush=True)
    return found[key]


def onnx_latency(programs: dict[str, Program]) -> list[dict[str, Any]]:
    """Median milliseconds of the files and how many times faster than dense, alternating, for 1 and 32 images and 1 and 2 threads."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = {method: Path(folder) / f"{i}.onnx" for i, method in enumerate(programs)}
        for method, program in programs.items():
            Result(program=program, reports=(), recipe=fxpress.Recipe(())).export_onnx(files[method])
        for threads in (1, 2):
            sessions = {method: open_session(path, threads=threads) for method, path in files.items()}
            (entry,) = {s.get_inputs()[0].name for s in sessions.values()}
            for batch in (1, 32):
                feed = {entry: torch.randn(batch, 1, 28, 28).numpy()}
                timed = latency({m: partial(s.run, None, feed) for m, s in sessions.items()}, rounds=200 if batch == 1 else 40)
                ms = {m: 1000 * timed[m].seconds.median for m in sessions}
                found.append({"threads": threads, "batch": batch, "ms": ms, "speedup": {m: 1 / timed[m].ratio.median for m in sessions}})
    return found


def tables(rows: list[Row], timings: list[dict[str, Any]]) -> str:
    """Two markdown tables."""
    lines = ["| net | method | MACs | parameters | before | `recover` | plain loop | prune s | recover s |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        after = f"{mean(r.recovered):.2f} ({min(r.recovered):.2f} to {max(r.recovered):.2f})" if r.recovered else "-"
        plain = f"{r.plain_loop:.2f}" if r.plain_loop is not None else "-"
        took = f"{mean(r.recover_seconds):.0f}" if r.recover_seconds else "-"
        lines.append(
            f"| {r.net} | {r.method} | {r.macs / 1e6:.2f}M | {r.parameters / 1e3:.0f}k | {r.before:.2f} | {after} | {plain} | {r.prune_seconds:.1f} | {took} |"
        )
    lines += [
        "",
        "| net | threads | batch | " + " | ".join(f"{m} ms (times faster)" for m in timings[0]["ms"]) + " |",
        "|---" * (3 + len(timings[0]["ms"])) + "|",
    ]
    for t in timings:
        cells = " | ".join(f"{t['ms'][m]:.3f} ({t['speedup'][m]:.2f})" for m in t["ms"])
        lines.append(f"| {t['net']} | {t['threads']} | {t['batch']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the nets that are named, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=["cnn", "resnet18"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 1], help="recoveries of each net, in the nets' order")
    parser.add_argument("--steps", type=int, default=Recovery.steps)
    parser.add_argument("--fresh", action="store_true", help="forget the recoveries of earlier runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings, kept, load = Recovery(steps=arguments.steps), cache_dir() / "structured-cnn.json", [os.getloadavg()]
    if arguments.fresh:
        kept.unlink(missing_ok=True)
    rows: list[Row] = []
    timings: list[dict[str, Any]] = []
    for net, seeds in zip(arguments.nets, arguments.seeds, strict=False):
        more = measure_net(net, seeds, settings, kept)
        rows, timings = rows + more[0], timings + more[1]
    print(tables(rows, timings))
    packages = ("torch", "torch-pruning", "onnxruntime", "fxpress")
    record = {
        "settings": {"prune": PRUNE, "recover": settings.spec(), "rates": RATES, "batch": settings.batch},
        "training": {net: load_trained(net)[1] for net in arguments.nets},
        "rows": [asdict(r) for r in rows],
        "onnxruntime": timings,
        "versions": {"python": platform.python_version(), **{p: installed(p) for p in packages}},
        "machine": {"cores": os.cpu_count(), "load_average_before_and_after": [*load, os.getloadavg()]},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1), encoding="utf-8")


def installed(package: str) -> str:
    """Its version."""
    return fxpress.__version__ if package == "fxpress" else version(package)


if __name__ == "__main__":
    main()
