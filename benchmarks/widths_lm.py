"""SmolLM2-135M nested without training: widths by layer under a budget against equal shares and MatFormer's rising ones, and prefixes as drafts.

    python benchmarks/widths_lm.py [--windows 8] [--importance elimination] [--unit macs] [--exchanges 24]
    python benchmarks/widths_lm.py --times    (seconds of the rows that are there, alternating; alone on the machine)

Budgets are those of 87.5, 75 and 50 % of every feed-forward layer. The search looks at two calibration batches (2,048 tokens of even articles), perplexity is
over odd ones. Rows go to benchmarks/results/widths_lm.json one by one. Baseline: the package's 4-bit weights dequantized to fp32.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from factorization_lm import Bench, smollm2

from fxpress.ir.files import cache_dir
from fxpress.ir.program import Program
from fxpress.ir.structure import Role, find_structure
from fxpress.passes.base import parse_pass
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.nesting.width_costs import Unit
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.search_widths import Found, Search, SearchWidths
from fxpress.passes.structured.groups import find_groups
from fxpress.runtime.elastic import Elastic
from fxpress.runtime.frontier import plot_frontier
from fxpress.runtime.language import logits_of
from fxpress.runtime.latency import latency
from fxpress.runtime.speculative import speculate

RESULTS = Path(__file__).with_name("results") / "widths_lm.json"
SHARES = (0.75, 0.5, 0.875)
DRAFTED, PROMPT, AHEAD = 32, 64, 4


def main() -> None:
    """Measure every layer once, then search at every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--importance", default="elimination", help="how nest orders units")
    parser.add_argument("--unit", default="macs", help="bytes, macs or latency")
    parser.add_argument("--exchanges", type=int, default=24, help="exchanges that are tried")
    parser.add_argument("--times", action="store_true", help="time the widths of the rows instead")
    arguments = parser.parse_args()
    bench, began = smollm2(arguments.windows), time.perf_counter()
    folder = cache_dir() / f"widths-{arguments.importance}"
    context = replace(bench.context, checkpoint=Checkpoint(folder, f"{arguments.importance} {arguments.windows}"))
    nested = run_pipeline(bench.program, [parse_pass(f"nest{{importance={arguments.importance},roles=[ffn]}}")], context).program
    if arguments.times:
        held = json.loads(RESULTS.read_text())
        held["times"] = times(held["rows"], nested)
        RESULTS.write_text(json.dumps(held, indent=1) + "\n")
        return
    options = SearchWidths(budget=0.9, unit=Unit(arguments.unit), multiple_of=32, min_keep=0.25, exchanges=arguments.exchanges)
    search = Search(options, nested, find_groups(nested, find_structure(nested), (Role.FFN,)), context)
    print(f"measured in {time.perf_counter() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        budget = 1 - (1 - share) * sum(c[0] for c in search.costs.values()) / search.total
        room = search.room(budget)
        starts = {"equal shares": search.ramp(room, 0), "rising with depth (MatFormer)": search.ramp(room, 1), "knapsack": search.knapsack(room)}
        candidates = {name: search.found(places, name, 0) for name, places in starts.items()} | {"knapsack and exchanges": search.run(budget)}
        for name, found in candidates.items():
            rows.append(row(bench, nested, name, share, found, arguments.importance))
            RESULTS.write_text(json.dumps({"rows": rows, "drafts": []}, indent=1) + "\n")
    plot_frontier([_point(rows, s) for s in sorted(SHARES)], RESULTS.with_suffix(".png"), title="SmolLM2-135M, nested without training")
    drafts = [draft(bench, nested, width) for width in (0.875, 0.75, 0.5)]
    RESULTS.write_text(json.dumps({"rows": rows, "drafts": drafts}, indent=1) + "\n")


def times(rows: list[dict[str, Any]], program: Program) -> list[dict[str, Any]]:
    """Time of each choice of widths over that of equal shares of as many multiply-accumulates: 256 tokens in torch, one thread."""
    torch.set_num_threads(1)
    elastic, ids = Elastic(program), torch.arange(256).unsqueeze(0)
    found = []
    for share in SHARES:
        views = {r["name"]: elastic.at(r["widths"]) for r in rows if r["ffn_share"] == share}
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        timed = latency({n: partial(view.run, **call) for n, view in views.items()}, rounds=15, clock=time.process_time)
        found.append({"ffn_share": share, **{n: timed[n].ratio.median for n in views}})
        print(found[-1], flush=True)
    return found


def row(bench: Bench, nested: Program, name: str, share: float, found: Found, importance: str) -> dict[str, Any]:
    """One choice of widths: its losses, and what the slice scores on held-out text."""
    small = run_pipeline(nested, [parse_pass(f"slice{{widths=[{','.join(str(w) for w in found.widths.values())}]}}")], bench.context).program
    facts = {"widths": list(found.widths.values()), "share": found.share, "predicted": found.predicted, "measured": found.measured}
    made = {"name": name, "ffn_share": share, "importance": importance, **facts, **bench.score(small), "exchanges": found.exchanges, **bench.facts}
    print(f"{share:<6} {name:<32} {found.share:.3f}  predicted {found.predicted:.4f}  measured {found.measured:.4f}  ppl {made['perplexity']:.2f}", flush=True)
    return made


def _point(rows: list[dict[str, Any]], share: float) -> dict[str, Any]:
    by_name = {r["name"]: r for r in rows if r["ffn_share"] == share}
    best, equal = by_name["knapsack and exchanges"], by_name["equal shares"]
    return {"budget": best["share"], "unit": "multiply-accumulates", **{k: best[k] for k in ("share", "predicted", "measured", "widths")}, "start": "",
            "equal_share": equal["share"], "equal_measured": equal["measured"]}  # fmt: skip


def draft(bench: Bench, nested: Program, width: float) -> dict[str, Any]:
    """A prefix drafts the continuation of four held-out windows; tokens equal plain greedy decoding by construction, and the tests hold it to that."""
    full, small = logits_of(nested), logits_of(Elastic(nested).at(width))
    found = [speculate(full, small, call[1]["input_ids"][:1, :PROMPT], DRAFTED, ahead=AHEAD) for call in bench.context.calibration[:4]]
    runs = sum(f.full_runs for f in found)
    made = {"width": width, "ahead": AHEAD, "mean_accepted": sum(sum(f.accepted) for f in found) / runs, "tokens_per_full_run": len(found) * DRAFTED / runs}
    print(made, flush=True)
    return made


if __name__ == "__main__":
    main()
