"""Perplexity of a compressed SmolLM2-135M, healed by layers, end to end, and both.

    python benchmarks/healing_lm.py [--windows 8] [--training 56] [--batch 2] [--device cpu] [--recipe "prune_structured{ratio=0.3}"] [--heal SPEC ...]

One compressed program for all rows; training windows of 512 tokens from even articles, evaluation windows from odd ones. Seconds are wall and process time
of the healing alone. Rows go to benchmarks/results/healing_lm.json as they are made. Baseline: the package's 4-bit weights dequantized to fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from factorization_lm import smollm2

from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline

RESULTS = Path(__file__).with_name("results") / "healing_lm.json"
HEALS = ("recover{scope=block}", "recover{steps=24,lr=2e-4,evaluate_every=12}")


def main() -> None:
    """Compress once, heal in every way, print one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--training", type=int, default=56, help="training windows of 512 tokens")
    parser.add_argument("--batch", type=int, default=2, help="training windows a batch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--recipe", default="prune_structured{ratio=0.3}", help="what is healed from")
    parser.add_argument("--heal", nargs="+", default=list(HEALS), help="specs, each on the compressed program; joined by ' + ' they run one after another")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the rows")
    arguments = parser.parse_args()
    bench = smollm2(arguments.windows, device=arguments.device, training_windows=arguments.training, batch=arguments.batch)
    context = replace(bench.context, original=bench.program)
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    facts = {"recipe": arguments.recipe, "training_windows": arguments.training, "batch": arguments.batch, **bench.facts}

    def row(name: str, one: Program, **taken: Any) -> None:
        rows.append({"healing": name, **bench.score(one), **taken, **facts})
        print(f"{name:<70} {rows[-1]['perplexity']:9.2f} {taken.get('seconds', 0.0):7.0f} {taken.get('process_seconds', 0.0):7.0f}", flush=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")

    print(f"{arguments.recipe:<70} {'ppl':>9} {'seconds':>7} {'cpu':>7}")
    small = run_pipeline(bench.program, [parse_pass(arguments.recipe)], context).program
    row("none", small)
    for specs in arguments.heal:
        healed, taken = _healed(small, specs.split(" + "), context)
        row(specs, healed, **taken)


def _healed(small: Program, specs: list[str], context: Context) -> tuple[Program, dict[str, Any]]:
    """The healed program and what healing took."""
    began, work = time.perf_counter(), time.process_time()
    outcome = run_pipeline(small, [parse_pass(s) for s in specs], replace(context, remarks=[]))
    facts = {"seconds": time.perf_counter() - began, "process_seconds": time.process_time() - work, "notes": [n for r in outcome.reports for n in r.notes]}
    return outcome.program, facts


if __name__ == "__main__":
    main()
