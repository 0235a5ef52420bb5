"""Speculative decoding over one cache: SmolLM2-135M, nested without training, its narrower widths drafting, all in ONNX Runtime over one file of weights.

    python benchmarks/speculation_lm.py [--rounds 3] [--tokens 64] [--ahead 1 2 4] [--threads 2]

Plain greedy decoding and every draft take turns over the same prompts (odd articles; calibration: even ones); the texts are checked to be equal. Speed-up is
the ratio of their seconds for the tokens after the prompt, median over rounds. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

import fxpress
from fxpress.ir.files import cache_dir
from fxpress.runtime import zoo
from fxpress.runtime.decoding import OnnxDecoder
from fxpress.runtime.demo import calibration_batches
from fxpress.runtime.elastic import Elastic
from fxpress.runtime.generation import generate
from fxpress.runtime.speculative import Speculation, speculate_cached

OUT = Path(__file__).with_name("results") / "speculation_lm.json"
WIDTHS = (1.0, 0.875, 0.75, 0.5)
PROMPT = 128


def windows(start: int, count: int, length: int) -> Tensor:
    """Tokens of every other article."""
    _, tokenizer = zoo.load_smollm2()
    return zoo.token_windows(tokenizer, zoo.wikipedia_articles()[start::2], length=length, count=count)


def folder() -> Path:
    """The nested model at its widths, written once."""
    place = cache_dir() / "speculation-lm"
    if not (place / "elastic.json").exists():
        model, _ = zoo.load_smollm2()
        calls = calibration_batches(windows(0, 16, 512))
        nested = fxpress.optimize(fxpress.capture_causal_lm(model), "nest{importance=loss,centre=true,roles=[ffn]}", calibration=calls)
        Elastic(nested.program).export_onnx(place, widths=WIDTHS)
    return place


def greedy(full: OnnxDecoder, ids: Tensor, tokens: int) -> Tensor:
    """Token after token."""
    full.start()
    return torch.cat([ids, torch.tensor([list(generate(full, ids[0], most=tokens))])], 1)


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds, and what it gave."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def main() -> None:
    """Every draft and every distance, in turn with plain decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ahead", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    place, prompts = folder(), windows(1, arguments.rounds, PROMPT)
    decoders = [
        OnnxDecoder(place / f"width-{i}.onnx", longest=PROMPT + arguments.tokens + 8, threads=arguments.threads, spin=False) for i in range(len(WIDTHS))
    ]
    full, rows = decoders[0], {(w, a): list[tuple[float, float, Speculation]]() for w in WIDTHS[1:] for a in arguments.ahead}
    greedy(full, prompts[:1], 4)
    for ids in prompts.split(1):
        first = seconds_of(lambda ids=ids: greedy(full, ids, 1))[0]
        for (width, ahead), found in rows.items():
            plain, text = seconds_of(lambda ids=ids: greedy(full, ids, arguments.tokens))
            draft = decoders[WIDTHS.index(width)]
            ours, speculation = seconds_of(lambda ids=ids, d=draft, a=ahead: speculate_cached(full, d, ids, arguments.tokens, ahead=a))
            assert torch.equal(speculation.ids, text), "speculative decoding gave another text"
            found.append((plain - first, ours - first, speculation))
    table = [
        {
            "width": width, "ahead": ahead, "mean_accepted": mean(s.mean_accepted for *_, s in found),
            "tokens_per_run": mean(s.tokens_per_run for *_, s in found),
            "times_faster": median(plain / ours for plain, ours, _ in found),
        }
        for (width, ahead), found in rows.items()
    ]  # fmt: skip
    OUT.write_text(json.dumps({"rounds": arguments.rounds, "tokens": arguments.tokens, "threads": arguments.threads, "rows": table}, indent=1) + "\n")
    for row in table:
        print("  ".join(f"{k} {v:.3g}" for k, v in row.items()))


if __name__ == "__main__":
    main()
