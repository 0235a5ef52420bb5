"""Perplexity of SmolLM2-135M with 20 and 30 % of its FFN units and heads removed, by every importance; then drop_blocks, then a short recovery.

    python benchmarks/structured_lm.py [--windows 16] [--ratios 0.2 0.3] [--only obs] [--recover 24]

One run, same calibration (8,192 tokens) and evaluation windows (other articles). `ratio` counts parameters of FFN and attention together. Writes
benchmarks/results/structured_lm.json as it goes. Baseline: the package's 4-bit weights dequantized to fp32 ("dequantized fp32", never "the original").
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fxpress.ir.axes import analyze_axes
from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.examples import as_examples
from fxpress.passes.pipeline import run_pipeline
from fxpress.runtime import zoo
from fxpress.runtime.demo import WINDOW, calibration_batches, load_demo
from fxpress.runtime.language import logits_of, perplexity

RESULTS = Path(__file__).with_name("results") / "structured_lm.json"
PUBLISHED = ("l1,compensation=off", "l2,compensation=off", "wanda,compensation=off", "flap,compensation=bias", "taylor,compensation=off")
OURS = ("wanda", "obs", "obs_fisher,compensation=off", "obs_fisher")


@dataclass
class Bench:
    """The program, its data, and the rows so far."""

    program: Program
    context: Context
    evaluation: Tensor
    rows: list[dict[str, Any]]

    def run(self, name: str, specs: list[str], **facts: Any) -> None:
        """Run a recipe, print its row and keep it."""
        began = time.perf_counter()
        outcome = run_pipeline(self.program, [parse_pass(s) for s in specs], self.context)
        seconds = time.perf_counter() - began
        row = self.row(name, outcome.program) | {"specs": specs, "seconds": seconds, "notes": [n for r in outcome.reports for n in r.notes]} | facts
        self.rows.append(row)
        print(f"{name:<58} {row['perplexity']:9.2f} {row['parameters'] / self.program.parameters:7.1%} {seconds:7.0f}", flush=True)
        RESULTS.write_text(json.dumps({"load": os.getloadavg(), "rows": self.rows}, indent=1))

    def row(self, name: str, program: Program) -> dict[str, Any]:
        """What a program measures."""
        score = perplexity(logits_of(program), self.evaluation, batch=2).perplexity
        return {"name": name, "perplexity": score, "parameters": program.parameters, "macs": analyze_axes(program).macs()}


def main() -> None:
    """Run everything and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--only", default="", help="run importances that contain this")
    parser.add_argument("--recover", type=int, default=24, help="recovery steps of 1,024 tokens (0: none)")
    arguments = parser.parse_args()
    bench = _bench(arguments.windows, arguments.recover)
    print(f"{'recipe':<58} {'ppl':>9} {'params':>7} {'seconds':>7}")
    bench.rows.append(bench.row("dequantized fp32", bench.program))
    print(f"{'dequantized fp32':<58} {bench.rows[0]['perplexity']:9.2f}")
    for ratio in arguments.ratios:
        for importance in [i for i in (*PUBLISHED, *OURS) if arguments.only in i]:
            spec = f"prune_structured{{ratio={ratio},importance={importance}}}"
            bench.run(spec, [spec], ratio=ratio)
        for spec in (f"drop_blocks{{count={round(30 * ratio)}}}", f"drop_blocks{{count={round(60 * ratio)},granularity=block}}"):
            bench.run(spec, [spec], ratio=ratio)
    for ratio in arguments.ratios if arguments.recover else ():
        spec = f"prune_structured{{ratio={ratio}}}"
        bench.run(f"{spec} + recover", [spec, f"recover{{steps={arguments.recover},lr=2e-4,evaluate_every=12}}"], ratio=ratio)


def _bench(windows: int, steps: int) -> Bench:
    data = load_demo()
    program = data.source.capture()
    articles = zoo.wikipedia_articles()
    evaluation = zoo.token_windows(data.source.tokenizer, articles[1::2], length=WINDOW, count=windows)
    training = zoo.token_windows(data.source.tokenizer, articles[0::2], length=WINDOW, count=max(16, 2 * steps + 8))
    context = Context(
        calibration=as_calls(calibration_batches(data.calibration), program.inputs),
        training=as_examples(calibration_batches(training), program.inputs) if steps else (),
    )
    return Bench(program, context, evaluation, [])


if __name__ == "__main__":
    main()
