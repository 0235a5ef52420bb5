"""Perplexity of every method of the spine on SmolLM2-135M, one run, same calibration and evaluation windows.

    python benchmarks/quality.py [--windows 16] [--only gptq]

Writes benchmarks/results/quality.json. bits*: true bits per weight of the linears, everything counted.
Baseline: the package's 4-bit weights dequantized to fp32 ("dequantized fp32", never "the original").
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
from fxpress.runtime.measure import measure_size
from fxpress.runtime.summary import sparsity

RECIPES = {
    "RTN 4 bit g64": ["quantize_rtn{bits=4,group_size=64}"],
    "GPTQ 4 bit g64": ["quantize_gptq{bits=4,group_size=64}"],
    "RTN 3 bit g64": ["quantize_rtn{bits=3,group_size=64}"],
    "GPTQ 3 bit g64": ["quantize_gptq{bits=3,group_size=64}"],
    "GPTQ 4 bit g64, int8 embedding (the demo)": ["quantize_gptq{bits=4,group_size=64}", "quantize_rtn{bits=8,kinds=[embedding]}"],
    "W8 per channel, embedding too": ["quantize_rtn{bits=8,kinds=[linear,embedding]}"],
    "magnitude 50 %": ["prune_magnitude{sparsity=0.5}"],
    "Wanda 50 %": ["prune_wanda{sparsity=0.5}"],
    "Wanda 50 %, then GPTQ 4 bit g64": ["prune_wanda{sparsity=0.5}", "quantize_gptq{bits=4,group_size=64}"],
}


def main() -> None:
    """Run every recipe and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows of 512 tokens")
    parser.add_argument("--only", default="", help="run recipes whose name contains this")
    arguments = parser.parse_args()
    data = load_demo()
    program = data.source.capture()
    articles = zoo.wikipedia_articles()
    evaluation = zoo.token_windows(data.source.tokenizer, articles[1::2], length=WINDOW, count=arguments.windows)
    calibration = calibration_batches(data.calibration)
    dense = logits_of(program)
    plain = perplexity(dense, evaluation, batch=2).perplexity
    rows: list[dict[str, Any]] = [{"recipe": "dequantized fp32", "perplexity": plain, "linear_bits_per_weight": measure_size(program).linear_bits_per_weight}]
    print(f"{'recipe':<44} {'ppl':>8} {'KL':>8} {'top-1':>6} {'bits*':>7} {'zeros':>6} {'seconds':>8}")
    print(f"{'dequantized fp32':<44} {plain:8.3f} {0:8.4f} {100:6.1f} {measure_size(program).linear_bits_per_weight:7.2f}")
    for name, recipe in RECIPES.items():
        if arguments.only.lower() in name.lower():
            rows.append(_row(name, recipe, program, calibration, evaluation, dense))
    Path(__file__).with_name("results").mkdir(exist_ok=True)
    (Path(__file__).with_name("results") / "quality.json").write_text(json.dumps(rows, indent=1))


def _row(name: str, recipe: list[str], program: Program, calibration: list[dict[str, Tensor]], evaluation: Tensor, dense: Logits) -> dict[str, Any]:
    began = time.perf_counter()
    result = fxpress.optimize(program, recipe, calibration=calibration)
    seconds = time.perf_counter() - began
    small = logits_of(result.lower("reference"))
    agreement = compare_logits(dense, small, evaluation[:2])
    row = {
        "recipe": name,
        "specs": recipe,
        "perplexity": perplexity(small, evaluation, batch=2).perplexity,
        "kl": agreement.kl,
        "top1": agreement.top1_agreement,
        "linear_bits_per_weight": measure_size(result.program).linear_bits_per_weight,
        "sparsity": sparsity(result.program),
        "nbytes": result.program.nbytes,
        "seconds": seconds,
        "notes": [note for report in result.reports for note in report.notes],
    }
    columns = f"{row['perplexity']:8.3f} {row['kl']:8.4f} {100 * row['top1']:6.1f} {row['linear_bits_per_weight']:7.2f} {row['sparsity']:6.3f}"
    print(f"{name:<44} {columns} {seconds:8.1f}", flush=True)
    return row


if __name__ == "__main__":
    main()
