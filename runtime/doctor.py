"""`fxpress doctor`: what is installed, and a small end-to-end check that takes seconds."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..ir.errors import FxpressError
from .optimize import optimize
from .result import Result

PACKAGES = ("fxpress", "torch", "networkx", "numpy", "safetensors", "onnx", "onnxruntime", "onnxscript", "onnx-ir", "triton", "transformers")


def run_doctor() -> bool:
    """Print the report; True when every check of what is installed passed."""
    console = Console()
    table = Table("what", "found", title="environment", title_justify="left")
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}, {torch.get_num_threads()} threads")
    for name in PACKAGES:
        table.add_row(name, _version(name))
    table.add_row("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "no device (the Triton target needs one to run)")
    console.print(table)
    return _run_checks(console)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _run_checks(console: Console) -> bool:
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    x = torch.randn(8, 64)
    result = optimize(net, ["prune_wanda{sparsity=0.5}", "quantize_gptq{bits=4,group_size=32}"], example_inputs=(x,), calibration=[x])
    checks: list[tuple[str, Callable[[], object]]] = [("reference lowering equals the compressed graph", lambda: _check_reference(result, x))]
    checks.append(("save and load are bit-equal", lambda: _check_artifact(result, x)))
    if _version("onnxruntime") != "not installed":
        checks.append(("ONNX export matches ONNX Runtime", lambda: _check_onnx(result)))
    passed = [_passes(console, name, check) for name, check in checks]
    return all(passed)


def _passes(console: Console, name: str, check: Callable[[], object]) -> bool:
    try:
        check()
    except (FxpressError, AssertionError) as error:
        console.print(f"[red]failed[/red]  {name}: {error}")
        return False
    console.print(f"[green]passed[/green]  {name}")
    return True


def _check_reference(result: Result, x: torch.Tensor) -> None:
    torch.testing.assert_close(result.lower("reference").run(x), result.program.run(x))


def _check_artifact(result: Result, x: torch.Tensor) -> None:
    from .artifact import load

    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "artifact")
        again = load(Path(folder) / "artifact").program.run(x)
    if not torch.equal(again, result.program.run(x)):
        raise AssertionError("outputs differ after a round trip")


def _check_onnx(result: Result) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result.export_onnx(Path(folder) / "model.onnx")
