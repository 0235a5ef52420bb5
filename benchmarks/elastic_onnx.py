"""One nested model at three widths in ONNX Runtime: a runtime width input, a graph a width with its own weights, or graphs over one mapped file.

    python benchmarks/elastic_onnx.py [--hidden 8192] [--inputs 1024]

A two-layer network, so that the weights are nearly all there is. Every variant runs in a process of its own: memory after the first run of every width, and
CPU milliseconds of one thread (the lower quartile of 21 runs) at 1 and 32 rows. Rows go to benchmarks/results/elastic_onnx.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fxpress
from fxpress.runtime.elastic import Elastic
from fxpress.runtime.elastic_onnx import ElasticSession
from fxpress.runtime.onnx_session import open_session

RESULTS = Path(__file__).with_name("results") / "elastic_onnx.json"
WIDTHS = (1.0, 0.5, 0.25)
VARIANTS = ("width input (Slice)", "own weights, prepacked", "one file, prepacked", "one file, mapped (default)")


def write(folder: Path, hidden: int, inputs: int) -> None:
    """All files of all variants."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, inputs)).eval()
    x = torch.randn(4, inputs)
    axes = ({0: torch.export.Dim("rows", max=4096)},)
    nested = fxpress.optimize(model, "nest", example_inputs=(x,), calibration=[(x,)], dynamic_shapes=axes)
    elastic = Elastic(nested.program)
    print(elastic.export_onnx(folder / "shared", WIDTHS))
    for place, width in enumerate(WIDTHS):
        fxpress.optimize(nested.program, f"slice{{ratio={width}}}" if width < 1 else []).export_onnx(folder / f"own-{place}.onnx")
    sliced(folder / "slice.onnx", nested.program)


def sliced(path: Path, program: fxpress.Program) -> None:
    """The same network with the width as an input: `Slice` of both weights in every run."""
    from onnx import TensorProto, helper, numpy_helper, save

    up, down = (s.matrix().numpy() for s in program.sites())
    first, second = (s.bias_vector().float().numpy() for s in program.sites())
    held = {"up": up, "down": np.ascontiguousarray(down.T), "b": first, "c": second, "zero": np.array([0]), "axis": np.array([0])}
    names = [i.name for i in open_session(path.parent / "own-0.onnx").get_inputs()]
    nodes = [
        *(helper.make_node("Slice", [n, "zero", "width", "axis"], [f"{n}_part"]) for n in ("up", "b", "down")),
        helper.make_node("Gemm", [names[0], "up_part", "b_part"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "down_part", "c"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", up.shape[1]]) for n in (names[0], "y")]
    width = helper.make_tensor_value_info("width", TensorProto.INT64, [1])
    graph = helper.make_graph(nodes, "slice", [ends[0], width], [ends[1]], [numpy_helper.from_array(v, n) for n, v in held.items()])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path, save_as_external_data=True, location="slice.bin")


def measure(folder: Path, variant: str) -> dict[str, Any]:
    """One variant in this process."""
    before = memory()
    sessions = [session(folder, variant, place) for place in range(len(WIDTHS))]
    name, hidden = sessions[0][0].get_inputs()[0].name, sessions[0][1]
    columns = sessions[0][0].get_inputs()[0].shape[1]
    feeds = {rows: {name: np.ones((rows, columns), np.float32)} for rows in (1, 32)}
    extra = [{"width": np.array([int(w * hidden)])} if hidden else {} for w in WIDTHS]
    for (one, _), more in zip(sessions, extra, strict=True):
        one.run(None, feeds[1] | more)
    used = {k: v - before[k] for k, v in memory().items()}
    times = {f"{w:g} x {rows}": clock(one, feed | more) for (one, _), w, more in zip(sessions, WIDTHS, extra, strict=True) for rows, feed in feeds.items()}
    return {"variant": variant, "private_mib": used["RssAnon"], "mapped_mib": used["RssFile"], "milliseconds": times}


def session(folder: Path, variant: str, place: int) -> tuple[Any, int]:
    """An ONNX Runtime session, and the full width where it is an input."""
    if variant.startswith("width"):
        found = _slices.setdefault("one", open_session(folder / "slice.onnx", threads=1))
        return found, int((folder / "hidden").read_text())
    if variant.startswith("own"):
        return open_session(folder / f"own-{place}.onnx", threads=1), 0
    return ElasticSession(folder / "shared", threads=1, share="mapped" in variant).at(WIDTHS[place]), 0


_slices: dict[str, Any] = {}


def clock(one: Any, feed: dict[str, Any]) -> float:
    """Lower quartile of the CPU milliseconds of a run."""
    found = []
    for _ in range(21):
        began = time.process_time()
        one.run(None, feed)
        found.append(1e3 * (time.process_time() - began))
    return sorted(found)[5]


def memory() -> dict[str, int]:
    """MiB of this process: private, and mapped from files."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith("Rss")}


def main() -> None:
    """Write everything, then measure every variant in a fresh process, twice in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "VARIANT"), help="measure one variant (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hidden").write_text(str(arguments.hidden))
        write(folder, arguments.hidden, arguments.inputs)
        rows = [one for _ in range(2) for v in VARIANTS for one in [_apart(folder, v)]]
    RESULTS.write_text(json.dumps({"hidden": arguments.hidden, "inputs": arguments.inputs, "rows": rows}, indent=1) + "\n")


def _apart(folder: Path, variant: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--measure", str(folder), variant], check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{variant:<28} private {row['private_mib']:4d} MiB  mapped {row['mapped_mib']:4d} MiB  {row['milliseconds']}", flush=True)
    return row


if __name__ == "__main__":
    main()
