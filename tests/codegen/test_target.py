"""Targets and fast paths are found by file stem, and refusals say what exists."""

from __future__ import annotations

import json
import types
from collections.abc import Callable

import pytest

from fxpress.codegen import No, Target, Yes, target_named, target_names
from fxpress.codegen.onnx_target.path import OnnxPath
from fxpress.codegen.target import class_in, fast_path
from fxpress.ir.errors import LowerError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.program import Program
from tests.checks import compress

ONNX = "fxpress.codegen.onnx_target"


def test_targets_are_named_after_their_files() -> None:
    assert {"onnx", "reference"} <= set(target_names())
    for name in target_names():
        target = target_named(name)
        assert isinstance(target, Target)
        assert target.name == name


@pytest.mark.parametrize(("name", "expected"), [("tensorrt", "onnx, reference"), ("onxx", "did you mean 'onnx'")])
def test_an_unknown_target_names_those_that_exist(name: str, expected: str) -> None:
    with pytest.raises(LowerError, match=f"unknown target '{name}'.*{expected}"):
        target_named(name)


def test_fast_paths_are_files() -> None:
    found = fast_path(ONNX, "affine", OnnxPath)  # type: ignore[type-abstract]
    assert isinstance(found, OnnxPath)
    assert fast_path(ONNX, "no_such_format", OnnxPath) is None  # type: ignore[type-abstract]


def test_only_a_modules_own_concrete_class_counts() -> None:
    module = types.ModuleType("somewhere")
    module.Imported = Yes  # type: ignore[attr-defined]
    assert class_in(module, Yes) is None
    own = type("Own", (Yes,), {"__module__": "somewhere"})
    module.Own = own  # type: ignore[attr-defined]
    assert class_in(module, Yes) is own


def test_the_onnx_target_explains_what_it_decodes(captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured("mlp")
    compress(program, program.sites()[0], Affine(bits=4))
    site, onnx = program.sites()[0], target_named("onnx")
    assert onnx.supports(site) == Yes()
    monkeypatch.setattr(f"{ONNX}.lowering.fast_path", lambda *_: None)
    answer = onnx.supports(site)
    assert isinstance(answer, No)
    assert "codegen/onnx_target/affine.py" in answer.reason


def test_reports_are_plain_data(captured: Callable[[str], Program]) -> None:
    report = target_named("reference").lower(captured("mlp")).report
    data = json.loads(json.dumps(report.to_dict()))
    assert data["target"] == "reference"
    assert [s["site"] for s in data["sites"]] == ["up", "down"]
    assert data["nbytes"] == report.nbytes
