"""One kind of layer in many formats, side by side in one file, against double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from fxpress.codegen.onnx_target import OnnxReport, export_onnx
from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.formats.base import WeightFormat, parse_format
from fxpress.ir.program import Program


class Side(nn.Module):
    """Layers that all read the same input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One output a layer."""
        return [layer(x) for layer in self.layers]


class Tied(nn.Module):
    """Embedding and output projection with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, T] int64 -> [B, T, 40]`."""
        return torch.nn.functional.linear(torch.tanh(self.embed(ids)), self.embed.weight)


def compressed(model: nn.Module, example: Tensor, formats: Sequence[str | WeightFormat], **options: Any) -> Program:
    """The captured model with its sites in `formats`, one for each."""
    program = capture(model.eval(), (example,), **options)
    with Editor(program, "test") as editor:
        for site, given in zip(program.sites(), formats, strict=True):
            fmt = parse_format(given) if isinstance(given, str) else given
            editor.compress(site, fmt, fmt.encode(site.matrix()), "test")
    return program


def shared(model: nn.Module, example: Tensor, given: str | WeightFormat) -> Program:
    """All sites of `model` read one payload."""
    program, fmt = capture(model.eval(), (example,)), parse_format(given) if isinstance(given, str) else given
    payload = fmt.encode(program.sites()[0].matrix())
    with Editor(program, "test") as editor:
        for site in program.sites():
            editor.compress(site, fmt, payload, "test")
    return program


def run(path: str, feed: dict[str, np.ndarray[Any, Any]], *, optimized: bool) -> list[np.ndarray[Any, Any]]:
    """Outputs of the file as written, or as ONNX Runtime optimizes it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feed)


def errors(make: Callable[[], nn.Module], example: Tensor, specs: Sequence[str], folder: Path) -> tuple[OnnxReport, dict[str, tuple[float, float]]]:
    """The report on one file with all formats, and per format the relative errors against double precision, exact and optimized."""
    report, exact, optimized = side_by_side(make, example, specs, folder)
    return report, dict(zip(specs, zip(exact, optimized, strict=True), strict=True))


def side_by_side(
    make: Callable[[], nn.Module], example: Tensor, formats: Sequence[str | WeightFormat], folder: Path, **options: Any
) -> tuple[OnnxReport, list[float], list[float]]:
    """The report on one file with all formats, and the relative errors of each against double precision, exact and as ONNX Runtime optimizes it."""
    torch.manual_seed(0)
    program = compressed(Side([make() for _ in formats]), example, formats)
    report = export_onnx(program, folder / "model.onnx", check=False, **options)
    expected = doubled(program, Side([make() for _ in formats]), example)
    found = []
    for optimized in (False, True):
        got = run(report.path, {"x": example.numpy()}, optimized=optimized)
        found.append([float(np.abs(g - e.numpy()).max() / e.abs().max()) for g, e in zip(got, expected, strict=True)])
    return report, found[0], found[1]


def doubled(program: Program, model: Side, example: Tensor) -> list[Tensor]:
    """Outputs of the decoded weights in double precision."""
    for site, layer in zip(program.sites(), model.layers, strict=True):
        state = {"weight": site.matrix().double().reshape(site.shape)}
        if site.bias is not None:
            state["bias"] = program.graph_module.get_parameter(site.bias).double()
        layer.double().load_state_dict(state)
    with torch.no_grad():
        outputs: list[Tensor] = model(example.double() if example.is_floating_point() else example)
    return outputs
