"""Perplexity of SmolLM2-135M-Instruct with its linears factorized, without retraining: every method at the same share of the linears' parameters, one run.

    python benchmarks/factorization_lm.py [--windows 8] [--calibration 16] [--only "80 %"] [--methods SVD] [--out FILE]

Writes benchmarks/results/factorization_lm.json, row by row; rows that the file holds already are kept and not run again. Calibration windows come from even
articles, evaluation windows from odd ones, 512 tokens each. Every linear of the blocks is factorized to the same ratio; the head is tied and stays.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

import fxpress
from fxpress.ir.chain import aten
from fxpress.ir.program import Program
from fxpress.runtime import zoo
from fxpress.runtime.demo import WINDOW, calibration_batches, load_demo
from fxpress.runtime.language import Logits, compare_logits, logits_of, perplexity

RATIOS = (0.9, 0.8, 0.7, 0.6)
METHODS = {
    "plain SVD": "factorize_svd{ratio=%s,metric=weight}",
    "whitened SVD": "factorize_svd{ratio=%s,sequential=false}",
    "whitened SVD, sequential": "factorize_svd{ratio=%s}",
    "MPO t=2, weight only": "factorize_mpo{ratio=%s,family=2,metric=weight}",
    "MPO t=8, weight only": "factorize_mpo{ratio=%s,family=8,metric=weight}",
    "MPO balanced, weight only (CompactifAI)": "factorize_mpo{ratio=%s,family=0,metric=weight}",
    "MPO t=2, refined": "factorize_mpo{ratio=%s,family=2}",
    "MPO t=4, refined": "factorize_mpo{ratio=%s,family=4}",
    "MPO t=8, refined": "factorize_mpo{ratio=%s,family=8}",
    "MPO, best member": "factorize_mpo{ratio=%s}",
}


def main() -> None:
    """Run every method at every ratio that the file does not hold yet."""
    results = Path(__file__).with_name("results")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--calibration", type=int, default=16, help="calibration windows of 512 tokens, 16 at most")
    parser.add_argument("--only", default="", help="run ratios whose name contains this")
    parser.add_argument("--methods", default="", help="run methods whose name contains this")
    parser.add_argument("--out", type=Path, default=results / "factorization_lm.json", help="where the rows go")
    arguments = parser.parse_args()
    data = load_demo()
    program = data.source.capture()
    evaluation = zoo.token_windows(data.source.tokenizer, zoo.wikipedia_articles()[1::2], length=WINDOW, count=arguments.windows)
    calibration = calibration_batches(data.calibration[: arguments.calibration])
    dense = logits_of(program)
    facts = {"windows": len(evaluation), "calibration_windows": min(arguments.calibration, len(data.calibration))}
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if not rows:
        rows = [
            {"ratio": "", "method": "dequantized fp32", "perplexity": perplexity(dense, evaluation, batch=2).perplexity, "linears": _linears(program)} | facts
        ]
    for ratio in RATIOS:
        for method, spec in METHODS.items():
            name = f"{100 * ratio:.0f} %"
            wanted = arguments.only in name and arguments.methods.lower() in method.lower()
            if wanted and not any((r["ratio"], r["method"]) == (name, method) for r in rows):
                rows.append({"ratio": name, "method": method} | _row(name, method, spec % ratio, program, calibration, evaluation, dense) | facts)
                arguments.out.parent.mkdir(exist_ok=True)
                arguments.out.write_text(json.dumps(rows, indent=1))


def _linears(program: Program) -> int:
    """Parameters of the linears, the tied head left out."""
    return sum(s.parameters for s in program.sites() if s.node.target is aten.linear.default and not s.tied)


def _row(ratio: str, method: str, spec: str, program: Program, calibration: list[dict[str, Tensor]], evaluation: Tensor, dense: Logits) -> dict[str, Any]:
    began = time.perf_counter()
    result = fxpress.optimize(program, [spec], calibration=calibration)
    seconds = time.perf_counter() - began
    small = logits_of(result.program)
    agreement = compare_logits(dense, small, evaluation[:2])
    taken = result.reports[0].taken
    row = {
        "spec": spec,
        "perplexity": perplexity(small, evaluation, batch=2).perplexity,
        "kl": agreement.kl,
        "top1": agreement.top1_agreement,
        "linears_kept": _linears(result.program) / _linears(program),
        "bytes_kept": result.program.nbytes / program.nbytes,
        "members": {f"t={t:g}": sum(r.facts.get("t") == t for r in taken) for t in sorted({r.facts["t"] for r in taken if "t" in r.facts})},
        "seconds": seconds,
    }
    print(f"{ratio:<6} {method:<40} {row['perplexity']:11.3f} {row['kl']:8.4f} {row['linears_kept']:6.3f} {seconds:8.1f}", flush=True)
    return row


if __name__ == "__main__":
    main()
