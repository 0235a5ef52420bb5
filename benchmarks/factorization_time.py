"""Low-rank pairs or matrix product operators at equal parameters and equal measured time: milliseconds a call of one linear, dense and factorized.

    python benchmarks/factorization_time.py [--rounds 30] [--threads 2] [--out FILE]

Writes benchmarks/results/factorization_time.json: for every shape, kept share, number of tokens and runtime (eager graph, ONNX Runtime) the median time of
each form and its ratio to the dense layer's in the same round; all forms run in turn. Weights are random: only the time matters here. Members of the family t
hold as many weights as the pair (t = 1) and do t times its arithmetic.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxpress
from fxpress.codegen.onnx_target import export_onnx
from fxpress.ir.capture import capture
from fxpress.ir.program import Program
from fxpress.runtime.latency import latency
from fxpress.runtime.onnx_session import open_session

SHAPES = ((576, 1536), (1536, 576), (2048, 2048))
RATIOS = (0.5, 0.3)
TOKENS = (1, 8, 64, 512)
FORMS = {"SVD pair": 1, "MPO t=2": 2, "MPO t=4": 4, "MPO t=8": 8}


def main() -> None:
    """Time every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which every form runs once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both runtimes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "factorization_time.json", help="where the rows go")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for shape in SHAPES for ratio in RATIOS for row in _rows(shape, ratio, arguments.rounds, arguments.threads)]
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"threads": arguments.threads, "rounds": arguments.rounds, "rows": rows}, indent=1))
    for row in rows:
        forms = "  ".join(f"{name} {form['ms']:.3f} ({form['over_dense']:.2f}x)" for name, form in row["forms"].items())
        print(f"{row['rows']}x{row['columns']} kept {row['ratio']:.0%} T={row['tokens']:<4} {row['runtime']:<5} {forms}")


def _rows(shape: tuple[int, int], ratio: float, rounds: int, threads: int) -> list[dict[str, Any]]:
    programs = _programs(shape, ratio)
    kept = {name: sum(s.parameters for s in p.sites()) / (shape[0] * shape[1]) for name, p in programs.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for number, (name, program) in enumerate(programs.items()):
            path = Path(folder) / f"{number}.onnx"
            export_onnx(program, path)
            sessions[name] = open_session(path, threads=threads)
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1])
            runtimes = {
                "eager": {name: _eager(p, x) for name, p in programs.items()},
                "onnx": {name: _session(s, x) for name, s in sessions.items()},
            }
            for runtime, calls in runtimes.items():
                timed = latency(calls, rounds=rounds, warmup=5)
                forms = {name: {"ms": 1000 * timed[name].seconds.median, "over_dense": timed[name].ratio.median, "kept": kept[name]} for name in calls}
                rows.append({"rows": shape[0], "columns": shape[1], "ratio": ratio, "tokens": tokens, "runtime": runtime, "forms": forms})
    return rows


def _programs(shape: tuple[int, int], ratio: float) -> dict[str, Program]:
    """The dense layer and its factorizations."""
    torch.manual_seed(0)
    net = nn.Linear(shape[1], shape[0], bias=False).eval()
    dense = capture(net, (torch.randn(4, shape[1]),), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}})
    spec = "factorize_mpo{ratio=%s,family=%d,metric=weight}"
    return {"dense": dense} | {name: fxpress.optimize(dense, [spec % (ratio, t)]).program for name, t in FORMS.items()}


def _eager(program: Program, x: Tensor) -> Callable[[], Any]:
    module = program.graph_module

    def call() -> Any:
        with torch.no_grad():
            return module(x)

    return call


def _session(session: Any, x: Tensor) -> Callable[[], Any]:
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)


if __name__ == "__main__":
    main()
