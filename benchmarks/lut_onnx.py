"""The ONNX files of learned tables on SmolLM2-135M: bytes against what is reported, agreement, decode time and resident memory against the dense export.

    python benchmarks/lut_onnx.py

One run, files alternating (batch 1, sequence 1, 2 threads, medians); memory is that of a fresh process that loads the file and decodes once.
Tables are clustered without data here, which changes neither bytes nor speed. Writes results/lut_onnx.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fxpress
from fxpress.runtime.demo import load_demo
from fxpress.runtime.latency import latency
from fxpress.runtime.measure import bits_per_weight
from fxpress.runtime.onnx_session import OnnxLanguageModel

EMBEDDING = "quantize_rtn{bits=8,kinds=[embedding]}"
HEAD = "quantize_rtn{bits=8,only=[lm_head]}"
LUT = "quantize_lut{{bits={b},sensitivity=uniform,refine=off,skip=[lm_head]{split}}}"
RECIPES = {
    "dense": [],
    "affine 4 bits g64": ["quantize_rtn{bits=4,group_size=64,skip=[lm_head]}", HEAD, EMBEDDING],
    "lut 4 bits": [LUT.format(b=4, split=""), HEAD, EMBEDDING],
    "lut 3 bits": [LUT.format(b=3, split=""), HEAD, EMBEDDING],
    "lut 2 bits": [LUT.format(b=2, split=""), HEAD, EMBEDDING],
    "lut 4 bits + 0.45 % apart": [LUT.format(b=4, split=",outliers=0.0045"), HEAD, EMBEDDING],
}


def resident(path: str) -> dict[str, float]:
    """MiB of this process before the file is loaded, after one token, and at its peak."""

    def status(key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 1024

    before = status("VmRSS")
    run = OnnxLanguageModel(Path(path), threads=2)
    run(torch.tensor([[42]]))
    return {"resident_mib": status("VmRSS") - before, "peak_mib": status("VmHWM") - before}


def main() -> None:
    """Export, check, time."""
    if len(sys.argv) == 2:
        print(json.dumps(resident(sys.argv[1])))
        return
    torch.set_num_threads(2)
    program = load_demo().source.capture()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            path = Path(folder) / f"{len(rows)}.onnx"
            result = fxpress.optimize(program, recipe)
            report = result.export_onnx(path)
            found = {"bits": bits_per_weight(result.program, lambda s: "proj" in s.name), "reported_bytes": report.lowering.nbytes}
            found |= {"file_bytes": report.file_bytes, "exact_error": report.max_error, "default_error": report.fused_error, "fused": report.fused}
            done = subprocess.run([sys.executable, "-W", "ignore", __file__, str(path)], check=True, capture_output=True, text=True)
            rows[name] = found | json.loads(done.stdout.splitlines()[-1])
        runs = {n: OnnxLanguageModel(Path(folder) / f"{i}.onnx", threads=2) for i, n in enumerate(rows)}
        speed = latency({n: partial(r, torch.tensor([[42]])) for n, r in runs.items()}, rounds=30)
    for name, row in rows.items():
        row["decode_ms"] = 1000 * speed[name].seconds.median
        row["faster_than_dense"] = speed["dense"].seconds.median / speed[name].seconds.median
        row["file_over_reported"] = row["file_bytes"] / row["reported_bytes"]
        print(f"{name:<28} " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
    Path(__file__).with_name("results").joinpath("lut_onnx.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
