"""Peak memory of quantize_lut on SmolLM2-135M above what the process held before, as a multiple of the model's fp32 bytes; each recipe in a process of its own.

    python benchmarks/pass_memory.py

The peak counts everything the pass makes: gradients, Fisher sums, Grams, activations of the calibration set, and the compressed model. Linux only.
Writes results/pass_memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline
from fxpress.runtime.demo import calibration_batches, load_demo

RECIPES = {
    "exact k-means, Fisher": "quantize_lut{bits=4,sensitivity=fisher,refine=off,skip=[lm_head]}",
    "LNQ guided": "quantize_lut{bits=4,skip=[lm_head]}",
    "LNQ guided, Fisher split": "quantize_lut{bits=4,sensitivity=fisher,outliers=0.004,sensitive=0.0005,skip=[lm_head]}",
    "GPTQ g64": "quantize_gptq{bits=4,group_size=64,skip=[lm_head]}",
}


def status(key: str) -> int:
    """A memory counter of this process, in bytes."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)).split()[1]) * 1024


def measure(recipe: str) -> dict[str, float]:
    """Run one recipe here; windows one at a time bound the activations."""
    data = load_demo()
    program = data.source.capture()
    fp32 = sum(p.numel() * 4 for p in data.source.model.parameters())
    context = Context(calibration=as_calls(calibration_batches(data.calibration, 1), program.inputs))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run_pipeline(program, [parse_pass(recipe)], context)
    return {"peak_over_fp32": (status("VmHWM") - before) / fp32, "peak_bytes": status("VmHWM") - before, "process_over_fp32": status("VmHWM") / fp32}


def main() -> None:
    """Every recipe in a process of its own."""
    if len(sys.argv) == 2:
        torch.set_num_threads(2)
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = {}
    for name, recipe in RECIPES.items():
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, recipe], check=True, capture_output=True, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<28} peak {rows[name]['peak_over_fp32']:.2f}x fp32 above the start, {rows[name]['process_over_fp32']:.2f}x in all", flush=True)
    Path(__file__).with_name("results").joinpath("pass_memory.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
