"""SmolLM2-135M with its feed-forward units in an order of importance, cut to a prefix of each, nothing trained: every score at every width.

    python benchmarks/nested_lm.py [--windows 8] [--orders loss elimination] [--seconds 3600]

Rows go to benchmarks/results/nested_lm.json one by one; rows that the file holds are kept. Calibration: 16 windows of 512 tokens from even articles,
evaluation: odd ones. Baseline: the package's 4-bit weights dequantized to fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from factorization_lm import Bench, smollm2

from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.pipeline import run_pipeline

RESULTS = Path(__file__).with_name("results") / "nested_lm.json"
RATIOS = (0.75, 0.5, 0.875)
ORDERS: dict[str, str] = {
    "the model's own order": "",
    "ours: loss-weighted elimination, centred": "nest{importance=loss,centre=true,roles=[ffn]}",
    "ours: elimination, centred": "nest{importance=elimination,centre=true,roles=[ffn]}",
    "activation (Nemotron Elastic)": "nest{importance=activation,roles=[ffn]}",
    "Wanda-structured": "nest{importance=wanda,roles=[ffn]}",
    "ridge leverage (UniQL)": "nest{importance=leverage,roles=[ffn]}",
    "fluctuation with bias (FLAP)": "nest{importance=fluctuation,centre=true,roles=[ffn]}",
    "Fisher (DynamicMatFormer)": "nest{importance=fisher,roles=[ffn]}",
    "elimination, not centred": "nest{importance=elimination,roles=[ffn]}",
    "loss-weighted elimination, not centred": "nest{importance=loss,roles=[ffn]}",
    "Wanda-structured, centred": "nest{importance=wanda,centre=true,roles=[ffn]}",
}


def main() -> None:
    """One order after another, each cut to every width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--orders", nargs="*", default=[""], help="run orders whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no order after so many seconds")
    arguments = parser.parse_args()
    bench, began = smollm2(arguments.windows), time.perf_counter()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for name, spec in ORDERS.items():
        wanted = [r for r in RATIOS if not any((x["order"], x["ratio"]) == (name, r) for x in rows)]
        if not wanted or not any(o in name for o in arguments.orders) or time.perf_counter() - began > arguments.seconds:
            continue
        start = time.perf_counter()
        nested = run_pipeline(bench.program, [parse_pass(spec)], bench.context).program if spec else bench.program
        seconds = time.perf_counter() - start
        for ratio in wanted:
            rows.append(row(bench, nested, name, ratio, seconds))
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def row(bench: Bench, nested: Program, name: str, ratio: float, seconds: float) -> dict[str, Any]:
    """One order at one width."""
    small = run_pipeline(nested, [parse_pass(f"slice{{ratio={ratio},unsorted=true}}")], bench.context).program
    found = {"order": name, "ratio": ratio, **bench.score(small), "parameters_kept": small.parameters / bench.program.parameters, "seconds": seconds}
    print(f"{name:<45} {ratio:<6} {found['perplexity']:10.2f}  kl {found['kl']:.3f}  {seconds:.0f} s", flush=True)
    return found | bench.facts


if __name__ == "__main__":
    main()
