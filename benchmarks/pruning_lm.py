"""Perplexity of SmolLM2-135M-Instruct pruned in one shot, without retraining: magnitude, Wanda and SparseGPT, one run, same windows for all.

    python benchmarks/pruning_lm.py [--windows 8] [--calibration 16] [--only 2:4] [--out FILE]

Writes benchmarks/results/pruning_lm.json. Calibration windows come from even articles, evaluation windows from odd ones, 512 tokens each; every linear of
the blocks is pruned, the head is tied to the embedding and stays. Baseline: the package's 4-bit weights dequantized to fp32 ("dequantized fp32").
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

import fxpress
from fxpress.ir.program import Program
from fxpress.runtime import zoo
from fxpress.runtime.demo import WINDOW, calibration_batches, load_demo
from fxpress.runtime.language import Logits, compare_logits, logits_of, perplexity

SETTINGS = {
    "50 %": "sparsity=0.5",
    "16:32": "pattern=16:32",
    "4:8": "pattern=4:8",
    "2:4": "pattern=2:4",
    "60 %": "sparsity=0.6",
}
METHODS = {
    "magnitude": "prune_magnitude{%s}",
    "Wanda": "prune_wanda{%s}",
    "SparseGPT as published": "prune_sparsegpt{%s,search=0,refine=0}",
    "SparseGPT, refit": "prune_sparsegpt{%s,search=0}",
    "SparseGPT, searched and refit": "prune_sparsegpt{%s}",
}


def main() -> None:
    """Run every method at every setting and print one row each."""
    results = Path(__file__).with_name("results")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--calibration", type=int, default=16, help="calibration windows of 512 tokens, 16 at most")
    parser.add_argument("--only", default="", help="run rows whose name contains this")
    parser.add_argument("--out", type=Path, default=results / "pruning_lm.json", help="where the rows go")
    arguments = parser.parse_args()
    data = load_demo()
    program = data.source.capture()
    evaluation = zoo.token_windows(data.source.tokenizer, zoo.wikipedia_articles()[1::2], length=WINDOW, count=arguments.windows)
    calibration = calibration_batches(data.calibration[: arguments.calibration])
    dense = logits_of(program)
    facts = {"windows": len(evaluation), "calibration_windows": min(arguments.calibration, len(data.calibration))}
    rows: list[dict[str, Any]] = [{"method": "dequantized fp32", "perplexity": perplexity(dense, evaluation, batch=2).perplexity} | facts]
    print(f"{'':<38} {'ppl':>9} {'KL':>8} {'top-1':>6} {'zeros':>7} {'seconds':>8}")
    print(f"{'dequantized fp32':<38} {rows[0]['perplexity']:9.3f}", flush=True)
    for setting, options in SETTINGS.items():
        for method, spec in METHODS.items():
            if arguments.only.lower() in f"{setting} {method}".lower():
                rows.append({"setting": setting, "method": method} | _row(setting, method, spec % options, program, calibration, evaluation, dense) | facts)
                arguments.out.parent.mkdir(exist_ok=True)
                arguments.out.write_text(json.dumps(rows, indent=1))


def _row(setting: str, method: str, spec: str, program: Program, calibration: list[dict[str, Tensor]], evaluation: Tensor, dense: Logits) -> dict[str, Any]:
    began = time.perf_counter()
    result = fxpress.optimize(program, [spec], calibration=calibration)
    seconds = time.perf_counter() - began
    taken = result.reports[0].taken
    weights = {s.name: s.parameters for s in program.sites()}
    total = sum(weights[t.site] for t in taken)
    small = logits_of(result.lower("reference"))
    agreement = compare_logits(dense, small, evaluation[:2])
    row = {
        "spec": spec,
        "perplexity": perplexity(small, evaluation, batch=2).perplexity,
        "kl": agreement.kl,
        "top1": agreement.top1_agreement,
        "sparsity": sum(weights[t.site] * t.facts["sparsity"] for t in taken) / total,
        "sites": len(taken),
        "seconds": seconds,
    }
    columns = f"{row['perplexity']:9.3f} {row['kl']:8.4f} {100 * row['top1']:6.1f} {row['sparsity']:7.4f} {seconds:8.1f}"
    print(f"{setting:<6} {method:<31} {columns}", flush=True)
    return row


if __name__ == "__main__":
    main()
