"""The Fashion-MNIST classifier with its convolutions made of one-way filters, next to Tucker-2 and CP of as many multiply-adds: fitted, then recovered.

    python benchmarks/train_fashion.py cnn --epochs 5     (once)
    python benchmarks/oneway_cnn.py [--steps 200] [--only NAME] [--only-timing]

Every row is a recipe at a quarter of the multiply-adds of the trained net (one-way filters: the number of terms that comes next to it), then `recover`
with labels and the dense net's answers, at a rate of 1e-3. Accuracies are of test images. Rows go to
benchmarks/results/oneway_cnn.json one by one; the ONNX files are timed at the end, alternating.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cnn_models import accuracy, load_trained
from equal_macs import fitting_spec
from recovery import Recovery, by_recover, recovery_data
from structured_cnn import BATCHES, onnx_latency

import fxpress
from fxpress.ir.axes import analyze_axes
from fxpress.ir.files import cache_dir
from fxpress.ir.program import Program
from fxpress.runtime.zoo_images import fashion_mnist

RESULTS = Path(__file__).with_name("results") / "oneway_cnn.json"
DENSE = "dense"
METHODS = {
    "Tucker-2, weight only (Kim 2016)": ("factorize_tucker{ratio=%s,metric=weight}", 0.25),
    "Tucker-2, data": ("factorize_tucker{ratio=%s}", 0.25),
    "CP, weight only (Lebedev 2015)": ("factorize_cp{ratio=%s,metric=weight}", 0.25),
    "CP, data": ("factorize_cp{ratio=%s}", 0.25),
    "one-way, 2 terms": ("oneway_conv{terms=2}", None),
    "one-way, 1 term": ("oneway_conv{terms=1}", None),
}


def made(dense: Program, spec: str, folder: Path) -> Program:
    """The fitted program, kept."""
    if not folder.exists():
        images, _ = fashion_mnist("train")
        fxpress.optimize(dense, spec.split(" -> "), calibration=[(x,) for x in images[:1024].split(64)]).save(folder)
    return fxpress.load(folder).program


def row_of(dense: Program, name: str, spec: str, settings: Recovery, kept: Path) -> dict[str, Any]:
    """Fit, judge, recover, judge."""
    began = time.process_time()
    kept.mkdir(parents=True, exist_ok=True)
    program = made(dense, spec, kept / "fitted")
    row = facts(dense, name, program) | {"spec": spec, "fit_cpu_seconds": time.process_time() - began, "recovery": asdict(settings)}
    healed = by_recover(program, dense, recovery_data(settings, 0), settings, 0)
    fxpress.Result(program=healed, reports=(), recipe=fxpress.Recipe(())).save(kept / "healed")
    row["after"] = accuracy(healed, *fashion_mnist("test"))
    print(f"{name}: {row['before']:.2f} -> {row['after']:.2f} %", flush=True)
    return row


def facts(dense: Program, name: str, program: Program) -> dict[str, Any]:
    """Sizes, and accuracy as it is."""
    sizes = {"parameters": program.parameters, "share": analyze_axes(program).macs() / analyze_axes(dense).macs()}
    return {"method": name, **sizes, "before": accuracy(program, *fashion_mnist("test"))}


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    columns = [f"ORT x ({t['threads']} threads, {t['batch']})" for t in record["onnxruntime"]]
    lines = ["| method | parameters | MACs | fitted | recovered | " + " | ".join(columns) + " |", "|---" * (5 + len(columns)) + "|"]
    for r in record["rows"]:
        gains = " | ".join(f"{t['speedup'].get(r['method'], 0):.2f}" for t in record["onnxruntime"])
        lines.append(f"| {r['method']} | {r['parameters']:,} | {100 * r['share']:.1f} % | {r['before']:.2f} | {r.get('after', r['before']):.2f} | {gains} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, time everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of recovery, 64 images each")
    parser.add_argument("--only", default="", help="run methods whose name contains this")
    parser.add_argument("--only-timing", action="store_true", help="time the files of the rows again")
    parser.add_argument("--no-timing", action="store_true", help="leave timings for later")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_trained("cnn")
    images, _ = fashion_mnist("train")
    dense = fxpress.capture(model, (images[:2],), **BATCHES)
    record: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": [facts(dense, DENSE, dense)], "onnxruntime": []}
    folder, known = cache_dir() / "oneway-cnn", {r["method"] for r in record["rows"]}
    places = {name: folder / str(place) for place, name in enumerate(METHODS)}
    for name, (spec, share) in METHODS.items() if not arguments.only_timing else ():
        if name not in known and arguments.only in name:
            record["rows"].append(row_of(dense, name, fitting_spec(dense, spec, share), Recovery(steps=arguments.steps), places[name]))
            RESULTS.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if not arguments.no_timing:
        rows = [r["method"] for r in record["rows"]]
        programs = {n: dense if n == DENSE else fxpress.load(places[n] / "healed").program for n in rows}
        record["onnxruntime"] = onnx_latency(programs)
    RESULTS.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
