"""Weight-only quantization of SmolLM2's 210 decoder linears at 2, 3 and 4 bits, and of MiniLM: every method over the same windows, true bits in every row.

    python benchmarks/quantization_lm.py [--bits 4 3 2] [--windows 8] [--model smollm2|minilm]

Peers come from `quantization_peers.py` and `squeezellm_peer.py` (run them before; a missing dump is said). Rows that results/quantization_MODEL.json holds
already are kept, so a run that dies goes on. Baseline: "dequantized fp32" (the package's linears lie on a 4-bit group-32 grid, which no setting here equals).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentence_quality
import torch
from quantization_peers import apply_peer, load_peer, peer_facts
from torch import Tensor

from fxpress.ir.program import Program
from fxpress.passes import sensitivities
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline
from fxpress.runtime import zoo
from fxpress.runtime.demo import WINDOW, calibration_batches, load_demo
from fxpress.runtime.language import logits_of, perplexity
from fxpress.runtime.measure import bits_per_weight

RESULTS = Path(__file__).with_name("results")
AWQ = "migrate_scales{{bits={b},group_size=64,search=mse}}"
SPLIT = "outliers=0.004,sensitive=0.0005"
RECIPES = {
    "RTN g64": ["quantize_rtn{{bits={b},group_size=64{skip}}}"],
    "GPTQ g64": ["quantize_gptq{{bits={b},group_size=64{skip}}}"],
    "AWQ + GPTQ g64": [AWQ, "quantize_gptq{{bits={b},group_size=64{skip}}}"],
    "ours: exact k-means": ["quantize_lut{{bits={b},sensitivity=fisher,refine=off{skip}}}"],
    "ours: exact k-means + 0.45 % apart": ["quantize_lut{{bits={b},sensitivity=fisher,refine=off," + SPLIT + "{skip}}}"],
    "ours: LNQ, published guidance": ["quantize_lut{{bits={b},power=1.0,damping=0.01{skip}}}"],
    "ours: LNQ guided": ["quantize_lut{{bits={b}{skip}}}"],
    "ours: LNQ guided + 0.45 % apart": ["quantize_lut{{bits={b}," + SPLIT + "{skip}}}"],
}
PEERS = {
    "HQQ g64": "hqq{b}",
    "NNCF AWQ + scale estimation g64": "nncf{b}",
    "NNCF, the same tokens as 128 samples": "nncf{b}-64",
    "SqueezeLLM (scikit-learn)": "squeezellm{b}",
}


@dataclass(frozen=True)
class Bench:
    """A program, its calibration, how it is scored, and the name pattern of what stays dense."""

    program: Program
    context: Context
    score: Callable[[Any], dict[str, float]]
    skip: str


def smollm2(windows: int) -> Bench:
    """Perplexity over held-out articles; the output layer stays dense, as with the peers."""
    data = load_demo()
    program = data.source.capture()
    evaluation = zoo.token_windows(data.source.tokenizer, zoo.wikipedia_articles()[1::2], length=WINDOW, count=windows)

    def score(model: Any) -> dict[str, float]:
        return {"perplexity": perplexity(logits_of(model), evaluation, batch=2).perplexity}

    return Bench(program, Context(calibration=as_calls(calibration_batches(data.calibration), program.inputs)), score, ",skip=[lm_head]")


def minilm(windows: int) -> Bench:
    """Lee-50 correlations, and cosines with the dense embeddings."""
    source = sentence_quality.minilm()
    program = source.capture()
    return Bench(program, Context(calibration=as_calls(source.calibration, program.inputs)), sentence_quality.score, "")


def once(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Fisher information of one program does not change between recipes."""
    kept: dict[str, dict[str, Tensor]] = {}

    def call(*arguments: Any) -> dict[str, Tensor]:
        if not kept:
            kept["all"] = function(*arguments)
        return kept["all"]

    return call


def main() -> None:
    """Run what is missing, print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--model", choices=("smollm2", "minilm"), default="smollm2")
    arguments = parser.parse_args()
    path = RESULTS / f"quantization_{arguments.model}.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    sensitivities.diagonal_fisher = once(sensitivities.diagonal_fisher)
    bench = {"smollm2": smollm2, "minilm": minilm}[arguments.model](arguments.windows)

    def add(name: str, make: Callable[[], dict[str, Any] | None]) -> None:
        if name not in rows:
            found = make()
            if found is None:
                print(f"{name:<52} not run")
                return
            rows[name] = found
            path.write_text(json.dumps(rows, indent=1))
        scores = " ".join(f"{k} {v:.4f}" for k, v in rows[name].items() if isinstance(v, float) and k not in ("bits", "seconds"))
        print(f"{name:<52} {rows[name]['bits']:7.3f} bits  {scores}  {rows[name]['seconds']:.0f} s", flush=True)

    add("dense", lambda: {"bits": 32.0, "seconds": 0.0} | bench.score(bench.program))
    for bits in arguments.bits:
        for name, recipe in RECIPES.items():
            add(f"{bits} bits, {name}", lambda r=recipe, b=bits: _recipe(bench, [s.format(b=b, skip=bench.skip) for s in r]))  # type: ignore[misc]
        for name, pattern in PEERS.items() if arguments.model == "smollm2" else ():
            add(f"{bits} bits, {name}", lambda p=pattern, b=bits: _peer(bench, p.format(b=b)))  # type: ignore[misc]


def _recipe(bench: Bench, recipe: list[str]) -> dict[str, Any]:
    began = time.perf_counter()
    outcome = run_pipeline(bench.program, [parse_pass(s) for s in recipe], bench.context)
    seconds = time.perf_counter() - began
    bits = bits_per_weight(outcome.program, lambda s: s.compressed)
    return {"recipe": recipe, "bits": bits, "seconds": seconds} | bench.score(outcome.program)


def _peer(bench: Bench, name: str) -> dict[str, Any] | None:
    tensors = load_peer(name)
    if tensors is None:
        return None
    facts, model = peer_facts(name), apply_peer(zoo.load_smollm2()[0], tensors)
    return {"peer": facts["version"], "bits": facts["bits_per_weight"], "seconds": facts["seconds"]} | bench.score(model)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
