"""What optimize + ONNX export costs on SmolLM2-135M, and how fast the file decodes, against the dense export; one run.

    python benchmarks/onnx_cost.py

Prints: seconds of `torch.onnx.export` of the dense model and of optimize + export (the passes' own time apart), their ratio (bound 1.5); peak
resident memory of optimize + export in a process of its own, as a multiple of the model's fp32 bytes (bound 4); decode time at batch 1, sequence 1 of
both files, alternating, and the ratio (bound 2).
Writes benchmarks/results/onnx_cost.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fxpress
from fxpress.runtime.demo import RECIPE, calibration_batches, load_demo
from fxpress.runtime.latency import latency
from fxpress.runtime.onnx_session import OnnxLanguageModel

HERE = Path(__file__).parent


def compressed(folder: Path) -> dict[str, float]:
    """Optimize and export in this process."""
    data = load_demo()
    fp32 = sum(p.numel() * 4 for p in data.source.model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    source = data.source
    result = fxpress.optimize(
        source.model, RECIPE, example_inputs=source.example_inputs, dynamic_shapes=source.dynamic_shapes, calibration=calibration_batches(data.calibration)
    )
    optimized = time.perf_counter()
    result.export_onnx(folder / "model.onnx")
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    passes = sum(r.seconds for r in result.reports)
    return {"optimize": optimized - began, "passes": passes, "export": done - optimized, "peak": peak, "peak_loaded": before, "fp32": fp32}


class Logits(torch.nn.Module):
    """The usual wrapper: token ids and mask in, logits out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`[B, S] -> [B, S, V]`."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def dense(folder: Path) -> dict[str, float]:
    """Export the dense model with torch.onnx.export."""
    source = load_demo().source
    inputs = {k: v for k, v in source.example_inputs.items() if k != "use_cache"}
    shapes = {k: source.dynamic_shapes[k] for k in inputs}
    began = time.perf_counter()
    names = {"output_names": ["logits"], "dynamo": True, "verbose": False}
    torch.onnx.export(Logits(source.model), (), str(folder / "dense.onnx"), kwargs=inputs, dynamic_shapes=shapes, **names)
    return {"export": time.perf_counter() - began, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _child(what: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, what, str(folder)], check=True, capture_output=True, text=True)
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def main() -> None:
    """Run both in processes of their own, then time the files against each other."""
    if len(sys.argv) == 3:
        print(json.dumps({"dense": dense, "compressed": compressed}[sys.argv[1]](Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, ours = _child("dense", folder), _child("compressed", folder)
        runs = {k: OnnxLanguageModel(folder / f, threads=2) for k, f in (("dense", "dense.onnx"), ("compressed", "model.onnx"))}
        token = torch.tensor([[42]])
        speed = latency({k: partial(run, token) for k, run in runs.items()}, rounds=40)
        size = (folder / "model.onnx").stat().st_size
    row = {
        "dense_export_seconds": plain["export"],
        "ours_seconds_without_passes": ours["optimize"] + ours["export"] - ours["passes"],
        "pass_seconds": ours["passes"],
        "cost_ratio": (ours["optimize"] + ours["export"] - ours["passes"]) / plain["export"],
        "peak_bytes": ours["peak"],
        "peak_over_fp32": ours["peak"] / ours["fp32"],
        "dense_export_peak_over_fp32": plain["peak"] / ours["fp32"],
        "decode_ms": {k: 1000 * speed[k].seconds.median for k in runs},
        "decode_ratio": speed["dense"].seconds.median / speed["compressed"].seconds.median,
        "file_bytes": size,
    }
    for key, value in row.items():
        print(f"{key:<30} {value if isinstance(value, dict) else round(value, 3)}")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "onnx_cost.json").write_text(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
