"""Load as Sparse, Compute as Dense on a GPU: every kernel against float64, and timed against cuBLAS, 2:4 and CSR of torch, and a copy, in one run.

    seq 0 11 | xargs -P 12 -I{} python benchmarks/lscd_gpu.py --compile {}/12  # optional: compile with many processes first
    python benchmarks/lscd_gpu.py                # a CUDA device, about five minutes
    python benchmarks/lscd_gpu.py --sweep        # tile sizes, warps and stages at one shape (also with --compile)
    TRITON_INTERPRET=1 python benchmarks/lscd_gpu.py --tiny   # no GPU: tiny shapes in the interpreter, to see that the script works

Shapes are those of Flash-LLM's benchmark (OPT-30B, 66B, 175B) and LLaMA-2-7B's; weights and masks are random. Each time is the median of runs that alternate
between all contestants, with the cache flushed before every run. Schedules (splits along K, tokens a program) are chosen by timing them first.
Writes results/lscd_<device>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from lscd_forms import CUDA, DEVICE, kept_of_group, weights
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxpress.codegen.triton_target.launch import matmul
from fxpress.codegen.triton_target.layout import Packed, Tile
from fxpress.codegen.triton_target.schedule import TOKEN_TILES, Schedule, schedule_for
from fxpress.codegen.triton_target.tuning import STAGES, candidates, fastest

SHAPES = {
    "OPT-30B qkv": (21504, 7168), "OPT-30B down": (7168, 28672), "OPT-66B up": (36864, 9216), "OPT-66B out": (9216, 9216),
    "OPT-175B up": (49152, 12288), "LLaMA-2-7B qkv": (12288, 4096), "LLaMA-2-7B down": (4096, 11008),
}  # fmt: skip
TOKENS = (16, 1, 8, 32, 64)  # those that matter most first: time may run out
TINY_SHAPES = {"tiny": (80, 160)}
TILES = ((64, 128), (128, 64), (128, 128))


def timed(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median microseconds of each, alternating."""
    flush = torch.empty(2**26 if CUDA else 1, dtype=torch.int32, device=DEVICE)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            flush.zero_()
            seconds[name].append(_once(call))
    return {name: 1e6 * statistics.median(taken) for name, taken in seconds.items()}


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` as a CUDA graph, so that Python's launch time is not measured."""
    if not CUDA:
        return call
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _once(call: Callable[[], Any]) -> float:
    if not CUDA:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def best_schedule(packed: Packed, x: Tensor, rounds: int, warps: tuple[int, ...] = (4,)) -> tuple[Schedule, float]:
    """The fastest of those that the operator itself would try, and its microseconds; fewer warps and depths than there, so that five minutes suffice."""
    rule = schedule_for(packed, len(x))
    cuts = [s for s in candidates(packed, rule) if (s.tokens, s.warps, s.stages) == (rule.tokens, rule.warps, rule.stages) and s.splits <= 4 * rule.splits]
    tried = [replace(c, warps=w, stages=g) for c, w, g in product(cuts, warps, STAGES)]
    tried = tried if CUDA else tried[:1]
    taken: dict[Schedule, float] = {}

    def seconds(schedule: Schedule) -> float:
        taken[schedule] = timed({"": replayed(lambda: matmul(packed, x, None, schedule))}, rounds)[""]
        return taken[schedule]

    best = fastest(tried, seconds)
    return best, taken[best]


def run(rows: int, columns: int, rounds: int, tokens: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Errors and microseconds of every contestant at one shape, for every number of tokens."""
    built = {name: build() for name, build in weights(rows, columns).items()}
    dense = (torch.randn(rows, columns, device=DEVICE) / 64).half()
    theirs = _theirs(dense)
    return {count: _compare(built, dense, theirs if count >= 8 else {}, count, rounds) for count in tokens}


def _compare(built: dict[str, tuple[Packed, Tensor]], dense: Tensor, theirs: dict[str, Tensor], tokens: int, rounds: int) -> dict[str, Any]:
    x = torch.randn(tokens, dense.shape[1], device=DEVICE).half()
    calls: dict[str, Callable[[], Any]] = {"cuBLAS float16": lambda: x @ dense.t(), "copy of the dense bytes": lambda: dense.clone()}
    facts: dict[str, Any] = {}
    for name, (packed, equal) in built.items():
        schedule, _ = best_schedule(packed, x, 3 if CUDA else 1)
        exact = x.double() @ equal.double().t()
        error = float((matmul(packed, x, None, schedule).double() - exact).abs().max() / exact.abs().max())
        plain = float(((x @ equal.t()).double() - exact).abs().max() / exact.abs().max())
        facts[name] = {"error": error, "plain_error": plain, "bits": 8 * packed.nbytes / dense.numel(), "splits": schedule.splits, "stages": schedule.stages}
        calls[name] = lambda p=packed, s=schedule: matmul(p, x, None, s)
    calls |= {name: lambda w=weight: torch.mm(w, x.t()) for name, weight in theirs.items()}
    for name, microseconds in timed({name: replayed(call) for name, call in calls.items()}, rounds).items():
        facts.setdefault(name, {})["microseconds"] = microseconds
    for row in facts.values():
        row["speedup"] = facts["cuBLAS float16"]["microseconds"] / row["microseconds"]
    return facts


def _theirs(dense: Tensor) -> dict[str, Tensor]:
    """Torch's 2:4 (cuSPARSELt or CUTLASS) and CSR at 50 %, where they exist."""
    if not CUDA:
        return {}
    pruned = dense * kept_of_group(*dense.shape, 2, 4)
    made = {"torch CSR 50 %": pruned.to_sparse_csr()}
    try:
        semi = torch.sparse.to_sparse_semi_structured(pruned)
        torch.mm(semi, torch.randn(dense.shape[1], 8, device=DEVICE).half())
        made["torch 2:4"] = semi
    except (RuntimeError, NotImplementedError) as error:
        print(f"torch 2:4 not timed: {str(error).splitlines()[0]}")
    return made


def compile_share(share: str, sweep: bool) -> None:
    """Run once, on a small weight, the variants of this process's share (`i/n`), so that a later run finds them compiled in Triton's cache."""
    index, count = map(int, share.split("/"))
    tiles, warps = (TILES, (4, 8)) if sweep else (((64, 128),), (4,))
    jobs = list(product(tiles, (16,) if sweep else TOKEN_TILES, STAGES, warps, (1, 2), weights(64, 512)))
    for tile, tokens, stages, warp, splits, name in jobs[index::count]:
        packed, _ = weights(256, 2048, Tile(rows=tile[0], columns=tile[1]))[name]()
        x, schedule = torch.randn(tokens, 2048, device=DEVICE).half(), Schedule(tokens=tokens, splits=splits, warps=warp, stages=stages)
        for bias in [None] if sweep else [None, x.new_zeros(256)]:
            with contextlib.suppress(OutOfResources):
                matmul(packed, x, bias, schedule)


def swept(rows: int, columns: int, tokens: int) -> dict[str, Any]:
    """The best schedule of every tile size for the forms that matter most."""
    x = torch.randn(tokens, columns, device=DEVICE).half()
    dense = (torch.randn(rows, columns, device=DEVICE) / 64).half()
    plain = timed({"": replayed(lambda: x @ dense.t())}, 20)[""]
    found: dict[str, Any] = {"cuBLAS float16": {"microseconds": plain}}
    for name, tile in product(weights(64, 512), TILES):
        packed, _ = weights(rows, columns, Tile(rows=tile[0], columns=tile[1]))[name]()
        schedule, microseconds = best_schedule(packed, x, 5, warps=(4, 8))
        found[f"{name} {tile[0]}x{tile[1]}"] = {"microseconds": microseconds, "speedup": plain / microseconds, **asdict(schedule)}
        print(f"{name:<26} {tile[0]}x{tile[1]:<4} {plain / microseconds:.2f}x  {schedule}", flush=True)
    return found


def save(results: dict[str, Any], name: str) -> None:
    """Write or add to `results/lscd_<device>.json`."""
    out = Path(__file__).with_name("results") / f"{name}_{torch.cuda.get_device_name().replace(' ', '_')}.json"
    out.write_text(json.dumps({"torch": torch.__version__, "triton": triton.__version__, "rows": results}, indent=1))


def main() -> None:
    """Every shape and number of tokens; one line a contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, one round: a smoke test that needs no GPU")
    parser.add_argument("--compile", default="", metavar="I/N", help="only compile the variants of share I of N")
    parser.add_argument("--sweep", action="store_true", help="tile sizes at one shape instead")
    parser.add_argument("--minutes", type=float, default=5.0, help="stop starting new shapes after so long")
    arguments = parser.parse_args()
    if not (CUDA or arguments.tiny):
        raise SystemExit("no CUDA device; to try the script without one: TRITON_INTERPRET=1 python benchmarks/lscd_gpu.py --tiny")
    if arguments.compile:
        return compile_share(arguments.compile, arguments.sweep)
    if arguments.sweep:
        return save(swept(*SHAPES["OPT-66B up"], tokens=16), "lscd_tiles")
    began, results = time.perf_counter(), {}
    for shape, (rows, columns) in (TINY_SHAPES if arguments.tiny else SHAPES).items():
        if time.perf_counter() - began > 60 * arguments.minutes:
            print(f"time is up before {shape}")
            continue
        for tokens, found in run(rows, columns, 1 if arguments.tiny else 20, (8,) if arguments.tiny else TOKENS).items():
            results[f"{shape} {rows}x{columns} N={tokens}"] = found
            for contestant, row in found.items():
                line = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
                print(f"{shape} N={tokens:<3} {contestant:<26} {line}", flush=True)
        if CUDA:
            save(results, "lscd")
    return None


if __name__ == "__main__":
    main()
