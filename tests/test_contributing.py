"""The recipes of CONTRIBUTING.md work as they are printed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fxpress.codegen import target_named
from fxpress.ir.formats import base as formats
from fxpress.ir.formats.base import parse_format
from fxpress.ir.program import Program
from fxpress.passes import base as passes
from fxpress.passes.base import parse_pass
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline

from .checks import compress
from .tiny import randn

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, flags=re.S))


def forget_names() -> None:
    """Let the registries look at their folders again."""
    for cached in (passes.pass_names, formats.format_names, formats.format_class, formats.parse_format):
        cached.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipes' files, as if they stood in their folders."""
    for name, code in RECIPES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code, encoding="utf-8")
        package = importlib.import_module("fxpress." + ".".join(file.relative_to(tmp_path).parent.parts))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
    forget_names()
    yield
    forget_names()
    for name in RECIPES:
        sys.modules.pop("fxpress." + name.removesuffix(".py").replace("/", "."), None)


def test_three_recipes() -> None:
    assert list(RECIPES) == ["passes/clip_outliers.py", "ir/formats/int8_rows.py", "codegen/onnx_target/int8_rows.py"]


@pytest.mark.usefixtures("installed")
def test_pass(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    method = parse_pass("clip_outliers{quantile=0.5,skip=[down]}")
    assert parse_pass(method.to_spec()) == method
    outcome = run_pipeline(program, [method], Context())
    up, down = outcome.program.sites()
    before = program.sites()
    limit = before[0].matrix().abs().quantile(0.5, dim=1, keepdim=True)
    assert torch.equal(up.matrix(), before[0].matrix().clamp(-limit, limit))
    assert torch.equal(down.matrix(), before[1].matrix())
    assert outcome.reports[0].taken[0].facts["clipped"] == pytest.approx(0.5)
    assert outcome.reports[0].skipped[0].why == "matched skip pattern 'down'"


@pytest.mark.usefixtures("installed")
def test_format(captured: Callable[[str], Program]) -> None:
    program, fmt = captured("mlp"), parse_format("int8_rows")
    before = {s.name: s.matrix() for s in program.sites()}
    for site in program.sites():
        compress(program, site, fmt)
    program.verify()
    for site in program.sites():
        payload = site.payload()
        assert site.nbytes == sum(t.nbytes for t in payload.values())
        assert bool(((site.matrix() - before[site.name]).abs() <= payload["scale"] * 0.5001).all())


@pytest.mark.usefixtures("installed")
def test_fast_path(captured: Callable[[str], Program]) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    import onnx_ir

    program = captured("mlp")
    for site in program.sites():
        compress(program, site, parse_format("int8_rows"))
    lowered = target_named("onnx").lower(program)
    assert [s.form for s in lowered.report.sites] == ["DequantizeLinear + MatMul"] * 2
    assert lowered.report.nbytes == program.nbytes
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused, it rounds the activations to 8 bits
    session = runtime.InferenceSession(onnx_ir.to_proto(lowered.artifact).SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = randn(5, 12)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), program.run(x), rtol=1e-5, atol=1e-5)
