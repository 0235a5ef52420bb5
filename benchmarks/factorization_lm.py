"""Language models and sentence encoders with their linears made smaller, with and without healing: every method at the same share of the parameters.

    python benchmarks/factorization_lm.py [--model smollm2|minilm] [--windows 8] [--only "80 %"] [--methods SVD] [--seconds 3600]

Rows go to benchmarks/results/factorization_MODEL.json one by one; rows that the file holds are kept, so a run that dies goes on. Calibration and healing use
even articles, evaluation odd ones. Shares are of the linears inside the blocks; the head is tied and stays. Every row also has the share of
the whole model's parameters and bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import sentence_quality
import torch

from fxpress.ir.edit import Editor
from fxpress.ir.operators import composed
from fxpress.ir.program import Program
from fxpress.ir.sites import SiteKind, WeightSite
from fxpress.passes.base import Decision, Pass, Plan, SiteResult, parse_pass
from fxpress.passes.calibrate import Statistics, as_calls
from fxpress.passes.context import Context
from fxpress.passes.examples import as_examples
from fxpress.passes.factorize_mpo import FactorizeMpo
from fxpress.passes.pipeline import run_pipeline
from fxpress.runtime import zoo
from fxpress.runtime.demo import WINDOW, calibration_batches, load_demo
from fxpress.runtime.language import compare_logits, logits_of, perplexity
from fxpress.runtime.sources import Source, text_inputs

RESULTS = Path(__file__).with_name("results")
RATIOS = (0.8, 0.6, 0.9, 0.7)
PUBLISHED = "decompose_modules{ratio=%s,neurons=leverage,values=own,pairs=norms,refit=nystrom,allocation=entropic}"
OURS = "decompose_modules{ratio=%s}"
TOKENS = 1024  # of a scored batch; operators are multiplied out where that is faster
HEAL = "recover{steps=24,lr=2e-4,evaluate_every=12}"
METHODS: dict[str, list[str]] = {
    "plain SVD": ["factorize_svd{ratio=%s,metric=weight}"],
    "whitened SVD": ["factorize_svd{ratio=%s,sequential=false}"],
    "whitened SVD, sequential": ["factorize_svd{ratio=%s}"],
    "MPO t=2, weight only": ["factorize_mpo{ratio=%s,family=2,metric=weight}"],
    "MPO t=4, weight only": ["factorize_mpo{ratio=%s,family=4,metric=weight}"],
    "MPO t=8, weight only": ["factorize_mpo{ratio=%s,family=8,metric=weight}"],
    "MPO balanced, weight only (CompactifAI)": ["factorize_mpo{ratio=%s,family=0,metric=weight}"],
    "MPO t=2, refined": ["factorize_mpo{ratio=%s,family=2}"],
    "MPO t=4, refined": ["factorize_mpo{ratio=%s,family=4}"],
    "MPO t=8, refined": ["factorize_mpo{ratio=%s,family=8}"],
    "MPO, best member": ["factorize_mpo{ratio=%s}"],
    "MoDeGPT as published": [PUBLISHED],
    "MoDeGPT, uniform": [PUBLISHED.replace("entropic", "uniform")],
    "ours: decompose_modules": [OURS],
    "plain SVD, healed": ["factorize_svd{ratio=%s,metric=weight}", HEAL],
    "MPO t=2, refined, healed": ["factorize_mpo{ratio=%s,family=2}", HEAL],
    "MPO t=4, refined, healed": ["factorize_mpo{ratio=%s,family=4}", HEAL],
    "MPO t=8, refined, healed": ["factorize_mpo{ratio=%s,family=8}", HEAL],
    "MPO balanced, weight only, healed (CompactifAI)": ["factorize_mpo{ratio=%s,family=0,metric=weight}", HEAL],
    "whitened SVD, sequential, healed": ["factorize_svd{ratio=%s}", HEAL],
    "MoDeGPT as published, healed": [PUBLISHED, HEAL],
    "ours: decompose_modules, healed": [OURS, HEAL],
}


class Multiplied(FactorizeMpo):
    """Cores multiplied out again: the same numbers as the operators they stand for, which at large t take up to eighty times the dense product's time."""

    makes_sites = False

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Nothing changes its form."""

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """The site's weight becomes what its cores make."""
        winner, _ = self.winner(site, site.matrix().float(), statistics)
        assert not isinstance(winner, str)
        editor.set_matrix(site, winner.cores.matrix(), "cores, multiplied out")
        after = winner.modes.parameters(winner.chi) * site.dtype.itemsize
        return SiteResult(site=site.name, action="cores", bytes_before=site.nbytes, bytes_after=after, facts={"t": float(winner.modes.b)})


@dataclass(frozen=True)
class Bench:
    """A dense program, its data and what a run remembers (one context for all rows: decompositions are made once), and what a small program scores."""

    program: Program
    context: Context
    score: Callable[[Program], dict[str, float]]
    facts: dict[str, Any]


def smollm2(windows: int, *, device: str = "cpu", training_windows: int = 56, batch: int = 2) -> Bench:
    """Perplexity over windows of 512 tokens; divergence from the dense model on two of them. Training windows come `batch` at a time."""
    data = load_demo()
    program = (data.source if device == "cpu" else _of_one_length(data.source, device)).capture()
    articles = zoo.wikipedia_articles()
    evaluation = zoo.token_windows(data.source.tokenizer, articles[1::2], length=WINDOW, count=windows)
    training = zoo.token_windows(data.source.tokenizer, articles[0::2], length=WINDOW, count=training_windows)
    dense = logits_of(program)

    def score(small: Program) -> dict[str, float]:
        agreement = compare_logits(dense, logits_of(small), evaluation[:2], batch=2)
        return {"perplexity": perplexity(logits_of(small), evaluation, batch=2).perplexity, "kl": agreement.kl, "top1": agreement.top1_agreement}

    context = _context(program, calibration_batches(data.calibration[:16]), calibration_batches(training, batch))
    return Bench(program, context, score, {"windows": len(evaluation), "calibration_windows": 16, "device": device_name(device)})


def _of_one_length(source: Source, device: str) -> Source:
    """On another device, with a dynamic batch and the length of the windows: torch 2.11 refuses a dynamic length of this model."""
    example = {**source.example_inputs, **text_inputs(torch.zeros(2, WINDOW, dtype=torch.int64))}
    axes = {k: {0: torch.export.Dim("batch", max=64)} if isinstance(v, torch.Tensor) else None for k, v in example.items()}
    return replace(source, model=source.model.to(device), example_inputs=example, dynamic_shapes=axes)


def device_name(device: str) -> str:
    """What rows say of where they were made."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def minilm() -> Bench:
    """Cosines of sentence embeddings with the dense model's on held-out passages, and agreement with people on Lee-50."""
    source = sentence_quality.minilm()
    more = sentence_quality.minilm(passages=512).calibration
    program = source.capture()
    return Bench(program, _context(program, source.calibration, more), sentence_quality.score, {"passages": 200, "calibration_passages": 128})


def _context(program: Program, calibration: Sequence[Any], training: Sequence[Any]) -> Context:
    return Context(calibration=as_calls(calibration, program.inputs), training=as_examples(training, program.inputs))


def main() -> None:
    """Run every method at every ratio that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "minilm"), default="smollm2")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens (smollm2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (smollm2)")
    parser.add_argument("--only", default="", help="run ratios whose name contains this")
    parser.add_argument("--methods", nargs="*", default=[""], help="run methods whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so many seconds")
    arguments = parser.parse_args()
    bench = smollm2(arguments.windows, device=arguments.device) if arguments.model == "smollm2" else minilm()
    out, began = RESULTS / f"factorization_{arguments.model}.json", time.perf_counter()
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    if not rows:
        rows = [{"ratio": "", "method": "dense"} | bench.score(bench.program) | {"linears": linears(bench.program, bench.program)} | bench.facts]
    for ratio, method in jobs():
        name = f"{100 * ratio:.0f} %"
        wanted = arguments.only in name and any(m.lower() in method.lower() for m in arguments.methods)
        if wanted and not any((r["ratio"], r["method"]) == (name, method) for r in rows) and time.perf_counter() - began < arguments.seconds:
            rows.append(row(bench, name, method, [s % ratio if "%s" in s else s for s in METHODS[method]]))
            out.write_text(json.dumps(rows, indent=1) + "\n")


def jobs() -> list[tuple[float, str]]:
    """Every method at every ratio; healed rows, which take minutes each, come last, ratio by ratio."""
    quick = [(r, m) for m in METHODS for r in RATIOS if "healed" not in m]
    return quick + [(r, m) for r in RATIOS for m in METHODS if "healed" in m]


def linears(program: Program, dense: Program) -> int:
    """Parameters of the linears, compressed or not; a head that was tied in the dense program is left out."""
    tied = {s.name for s in dense.sites() if s.tied}
    return sum(s.parameters for s in program.sites() if s.kind is SiteKind.LINEAR and s.name not in tied)


def multiplied(made: Pass) -> Pass:
    """The pass, its operators scored as the matrices that they are."""
    return Multiplied(**{f.name: getattr(made, f.name) for f in fields(made)}) if isinstance(made, FactorizeMpo) else made


def row(bench: Bench, ratio: str, method: str, specs: list[str]) -> dict[str, Any]:
    """One recipe: what it scores, what it keeps, and how long it took."""
    began = time.perf_counter()
    result = run_pipeline(bench.program, [multiplied(parse_pass(s)) if len(specs) == 1 else parse_pass(s) for s in specs], bench.context)
    seconds = time.perf_counter() - began
    taken = result.reports[0].taken
    members = {f"t={t:g}": sum(r.facts.get("t") == t for r in taken) for t in sorted({r.facts["t"] for r in taken if "t" in r.facts})}
    cores = specs[0].startswith("factorize_mpo") and len(specs) == 1
    out = sum(t.bytes_before - t.bytes_after for t in taken) if cores else 0  # they were multiplied out
    found = {
        "ratio": ratio, "method": method, "specs": specs, **bench.score(composed(result.program, TOKENS)),
        "linears_kept": (linears(result.program, bench.program) - out // 4) / linears(bench.program, bench.program),
        "parameters_kept": (result.program.parameters - out // 4) / bench.program.parameters,
        "bytes_kept": (result.program.nbytes - out) / bench.program.nbytes, "members": members, "seconds": seconds, **bench.facts,
    }  # fmt: skip
    quality = "  ".join(f"{k} {v:.4f}" for k, v in found.items() if k in ("perplexity", "kl", "cosine_mean", "pearson"))
    print(f"{ratio:<6} {method:<40} {quality}  linears {found['linears_kept']:.3f}  {seconds:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    main()
