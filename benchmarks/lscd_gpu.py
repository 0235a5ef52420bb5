"""Load as Sparse, Compute as Dense on a GPU: every kernel against float64, and timed against cuBLAS, 2:4 and CSR of torch, and a copy, in one run.

    python benchmarks/lscd_gpu.py                # a CUDA device, about five minutes
    TRITON_INTERPRET=1 python benchmarks/lscd_gpu.py --tiny   # no GPU: tiny shapes in the interpreter, to see that the script works

Shapes are those of Flash-LLM's benchmark (OPT-30B, 66B, 175B) and LLaMA-2-7B's; weights and masks are random. Each time is the median of runs that alternate
between all contestants, with the cache flushed before every run. Schedules (splits along K, tokens a program) are chosen by timing them first.
Writes results/lscd_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxpress.codegen.triton_target.launch import matmul
from fxpress.codegen.triton_target.layout import Packed, Structure, Tile, Values
from fxpress.codegen.triton_target.pack import Source, pack
from fxpress.codegen.triton_target.schedule import Schedule, schedule_for
from fxpress.codegen.triton_target.tuning import candidates, fastest

SHAPES = {
    "OPT-30B qkv": (21504, 7168), "OPT-30B down": (7168, 28672), "OPT-66B up": (36864, 9216), "OPT-66B out": (9216, 9216),
    "OPT-175B up": (49152, 12288), "LLaMA-2-7B qkv": (12288, 4096), "LLaMA-2-7B down": (4096, 11008),
}  # fmt: skip
TOKENS = (16, 1, 8, 32, 64)  # those that matter most first: time may run out
DENSITIES = (0.3, 0.5, 0.7, 0.9)
TINY_SHAPES = {"tiny": (80, 160)}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def kept_of_group(rows: int, columns: int, keep: int, group: int) -> Tensor:
    """A random mask `[rows, columns] bool` with exactly `keep` of every `group` columns."""
    return (torch.rand(rows, columns // group, group, device=DEVICE).argsort(-1) < keep).flatten(1)


def weights(rows: int, columns: int) -> dict[str, Callable[[], tuple[Packed, Tensor]]]:
    """Every contestant of ours: the packed weight and its dense float16 equal."""

    def build(structure: Structure, kind: Values, density: float) -> tuple[Packed, Tensor]:
        if structure is Structure.DENSE:
            present = torch.ones(rows, columns, dtype=torch.bool, device=DEVICE)
        elif structure is Structure.BITMAP:
            present = torch.rand(rows, columns, device=DEVICE) < density
        else:
            width = 4 if structure is Structure.TWO_OF_FOUR else 32
            present = kept_of_group(rows, columns, round(density * width), width)
        if kind is Values.HALF:
            values = torch.randn(rows, columns, device=DEVICE).half() / 64
            return pack(Source(kind=kind, values=values, dtype=torch.float16, present=present), structure, Tile()).to(DEVICE), values * present
        codes = torch.randint(0, 16, (rows, columns), device=DEVICE, dtype=torch.uint8)
        scale, zero = torch.full((rows, 1), 1 / 256, device=DEVICE).half(), torch.full((rows, 1), 8.0, device=DEVICE)
        source = Source(kind=kind, values=codes, dtype=torch.float16, present=present, scale=scale, zero=zero)
        return pack(source, structure, Tile()).to(DEVICE), (codes.half() - 8) * scale * present

    forms = {f"bitmap {d:.0%} float16": (Structure.BITMAP, Values.HALF, d) for d in DENSITIES}
    forms |= {f"bitmap {d:.0%} 4 bits": (Structure.BITMAP, Values.CODE4, d) for d in (0.3, 0.5)}
    forms |= {"balanced 16:32 float16": (Structure.BALANCED, Values.HALF, 0.5), "balanced 16:32 4 bits": (Structure.BALANCED, Values.CODE4, 0.5)}
    forms |= {"2:4 float16": (Structure.TWO_OF_FOUR, Values.HALF, 0.5), "4 bits": (Structure.DENSE, Values.CODE4, 1.0)}
    return {name: lambda f=form: build(*f) for name, form in forms.items()}


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


def best_schedule(packed: Packed, x: Tensor, rounds: int) -> Schedule:
    """The fastest of those that the operator itself would try, but for warps and narrow tiles of tokens: compiling those would take the five minutes."""
    rule = schedule_for(packed, len(x))
    tried = [s for s in candidates(packed, rule) if (s.tokens, s.warps) == (rule.tokens, rule.warps) and s.stages >= rule.stages]

    def seconds(schedule: Schedule) -> float:
        return timed({"": replayed(lambda: matmul(packed, x, None, schedule))}, rounds)[""]

    return fastest(tried if CUDA else tried[:2], seconds)


def run(rows: int, columns: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Errors and microseconds of every contestant at one shape."""
    x = torch.randn(tokens, columns, device=DEVICE).half()
    dense = (torch.randn(rows, columns, device=DEVICE) / 64).half()
    calls: dict[str, Callable[[], Any]] = {"cuBLAS float16": lambda: x @ dense.t(), "copy of the dense bytes": lambda: dense.clone()}
    facts: dict[str, Any] = {}
    for name, build in weights(rows, columns).items():
        packed, equal = build()
        schedule = best_schedule(packed, x, 3)
        exact = x.double() @ equal.double().t()
        error = float((matmul(packed, x, None, schedule).double() - exact).abs().max() / exact.abs().max())
        plain = float(((x @ equal.t()).double() - exact).abs().max() / exact.abs().max())
        facts[name] = {"error": error, "plain_error": plain, "bits": 8 * packed.nbytes / (rows * columns), "splits": schedule.splits}
        calls[name] = lambda p=packed, s=schedule: matmul(p, x, None, s)
        del equal, exact
    calls |= _theirs(x, dense)
    for name, microseconds in timed({name: replayed(call) for name, call in calls.items()}, rounds).items():
        facts.setdefault(name, {})["microseconds"] = microseconds
    for row in facts.values():
        row["speedup"] = facts["cuBLAS float16"]["microseconds"] / row["microseconds"]
    return facts


def _theirs(x: Tensor, dense: Tensor) -> dict[str, Callable[[], Any]]:
    """Torch's 2:4 (cuSPARSELt or CUTLASS) and CSR at 50 %, where they exist."""
    if not CUDA or x.shape[0] < 8:
        return {}
    pruned = dense * kept_of_group(*dense.shape, 2, 4)
    calls: dict[str, Callable[[], Any]] = {}
    try:
        semi = torch.sparse.to_sparse_semi_structured(pruned)
        torch.mm(semi, x.t())
        calls["torch 2:4"] = lambda: torch.mm(semi, x.t())
    except (RuntimeError, NotImplementedError) as error:
        print(f"torch 2:4 not timed: {str(error).splitlines()[0]}")
    csr = pruned.to_sparse_csr()
    calls["torch CSR 50 %"] = lambda: csr @ x.t()
    return calls


def main() -> None:
    """Every shape and number of tokens; one line a contestant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, one round: a smoke test that needs no GPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="stop starting new shapes after so long")
    arguments = parser.parse_args()
    if not (CUDA or arguments.tiny):
        raise SystemExit("no CUDA device; to try the script without one: TRITON_INTERPRET=1 python benchmarks/lscd_gpu.py --tiny")
    name = torch.cuda.get_device_name().replace(" ", "_") if CUDA else "interpreter"
    began, results = time.perf_counter(), {}
    for tokens, (shape, (rows, columns)) in product((8,) if arguments.tiny else TOKENS, (TINY_SHAPES if arguments.tiny else SHAPES).items()):
        if time.perf_counter() - began > 60 * arguments.minutes:
            print(f"time is up before {shape}, {tokens} tokens")
            continue
        found = run(rows, columns, tokens, 1 if arguments.tiny else 20)
        results[f"{shape} {rows}x{columns} N={tokens}"] = found
        for contestant, row in found.items():
            line = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
            print(f"{shape} N={tokens:<3} {contestant:<26} {line}", flush=True)
    if CUDA:
        Path(__file__).with_name("results").joinpath(f"lscd_{name}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
