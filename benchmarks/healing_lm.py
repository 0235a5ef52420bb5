"""Perplexity of SmolLM2-135M with 30 % of its FFN and attention parameters removed, healed by layers, end to end, and both, at about equal time.

    python benchmarks/healing_lm.py [--windows 8] [--training 64] [--recipe "prune_structured{ratio=0.3}"] [--heal SPEC ...]

One compressed program for all rows; training windows of 512 tokens from even articles, evaluation windows from odd ones. Seconds are wall and process time
of the healing alone. Writes benchmarks/results/healing_lm.json as it goes. Baseline: the package's 4-bit weights dequantized to fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.examples import as_examples
from fxpress.passes.pipeline import run_pipeline
from fxpress.runtime import zoo
from fxpress.runtime.demo import WINDOW, calibration_batches, load_demo
from fxpress.runtime.language import logits_of, perplexity

RESULTS = Path(__file__).with_name("results") / "healing_lm.json"
HEALS = ("recover{scope=block}", "recover{steps=24,lr=2e-4,evaluate_every=12}")


def main() -> None:
    """Compress once, heal in every way, print one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--training", type=int, default=64, help="training windows of 512 tokens, two a batch")
    parser.add_argument("--recipe", default="prune_structured{ratio=0.3}", help="what is healed from")
    parser.add_argument("--heal", nargs="+", default=list(HEALS), help="specs, each on the compressed program; joined by ' + ' they run one after another")
    arguments = parser.parse_args()
    data = load_demo()
    program, articles = data.source.capture(), zoo.wikipedia_articles()
    evaluation = zoo.token_windows(data.source.tokenizer, articles[1::2], length=WINDOW, count=arguments.windows)
    training = zoo.token_windows(data.source.tokenizer, articles[0::2], length=WINDOW, count=arguments.training)
    context = Context(
        calibration=as_calls(calibration_batches(data.calibration), program.inputs),
        training=as_examples(calibration_batches(training), program.inputs),
        original=program,
    )
    rows: list[dict[str, Any]] = []

    def row(name: str, one: Program, **facts: Any) -> None:
        score = perplexity(logits_of(one), evaluation, batch=2).perplexity
        rows.append({"name": name, "perplexity": score, "windows": len(evaluation), "training_windows": len(training)} | facts)
        print(f"{name:<70} {score:9.2f} {facts.get('seconds', 0.0):7.0f} {facts.get('process_seconds', 0.0):7.0f}", flush=True)
        RESULTS.write_text(json.dumps({"load": os.getloadavg(), "recipe": arguments.recipe, "rows": rows}, indent=1))

    print(f"{'recipe':<70} {'ppl':>9} {'seconds':>7} {'cpu':>7}")
    row("dequantized fp32", program)
    small = run_pipeline(program, [parse_pass(arguments.recipe)], context).program
    row(arguments.recipe, small)
    for specs in arguments.heal:
        healed, facts = _healed(small, specs.split(" + "), context)
        row(specs, healed, **facts)


def _healed(small: Program, specs: list[str], context: Context) -> tuple[Program, dict[str, Any]]:
    """The healed program and what healing took."""
    began, work = time.perf_counter(), time.process_time()
    outcome = run_pipeline(small, [parse_pass(s) for s in specs], replace(context, remarks=[]))
    facts = {"seconds": time.perf_counter() - began, "process_seconds": time.process_time() - work, "notes": [n for r in outcome.reports for n in r.notes]}
    return outcome.program, facts


if __name__ == "__main__":
    main()
