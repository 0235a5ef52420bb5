"""House rules, checked over the whole tree: one thing a file, named after it, documented, with a twin test; small files and functions."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from fxpress.ir.axis_rules.registry import RULES
from fxpress.ir.errors import SpecError
from fxpress.ir.formats.base import WeightFormat, format_class, format_names, parse_format
from fxpress.ir.spec import Options, parse_spec
from fxpress.passes.base import Guarantee, Pass, parse_pass, pass_class, pass_names

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ir", "passes", "codegen", "runtime")
MAX_FILE, MAX_FUNCTION = 350, 60

# Exceptions, each with its present length. The lists may only shrink: an entry that is no longer needed, or too generous, fails.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}

SOURCES = sorted(p for folder in (*FOLDERS, "tests") for p in (ROOT / folder).glob("**/*.py") if "__pycache__" not in p.parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def camel(stem: str) -> str:
    return "".join(word.capitalize() for word in stem.split("_"))


def example(cls: type[Options]) -> Options:
    """An instance with a legal value for every option that has no default."""
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    required = [f for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]
    try:
        return cls(**{f.name: legal_value(hints[f.name], f.metadata) for f in required})
    except SpecError as error:  # options that go together: the refusal must name an example, and the example must be legal
        found = re.search(rf"for example ({cls.name}\{{[^}}]*\}})", str(error))
        if found is None:
            raise
        return cls.from_dict(parse_spec(found[1])[1])


def legal_value(hint: Any, bounds: typing.Mapping[str, Any]) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(iter(hint))
    if hint is int:
        return min(bounds.get("le", 4), max(bounds.get("ge", 4), 4))
    if hint is float:
        return min(bounds.get("le", 0.5), max(bounds.get("ge", 0.5), 0.5))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return legal_value(typing.get_args(hint)[0], bounds)
    return typing.get_origin(hint)() if typing.get_origin(hint) else "text"


def assert_documented(cls: type) -> None:
    module = ast.parse(Path(module_file(cls)).read_text(encoding="utf-8"))
    for doc in (ast.get_docstring(module), cls.__doc__):
        assert doc, f"{cls.__name__} and its file need a docstring"
        assert doc.splitlines()[0].rstrip().endswith((".", ":")), f"{cls.__name__}: a docstring starts with one sentence"


def module_file(cls: type) -> str:
    return str(importlib.import_module(cls.__module__).__file__)


@pytest.mark.parametrize("name", pass_names())
def test_passes(name: str) -> None:
    cls = pass_class(name)
    assert cls.__name__ == camel(name)
    assert cls.name == name
    assert isinstance(cls.guarantee, Guarantee)
    assert_documented(cls)
    built = example(cls)
    assert isinstance(built, Pass)
    narrowed = dataclasses.replace(built, only=("a.*", "re:^b[0-9]"), skip=("*head",))
    for item in (built, narrowed):
        assert parse_pass(item.to_spec()) == item
        assert cls.from_dict(item.to_dict()) == item
    assert (ROOT / "tests" / "passes" / f"test_{name}.py").exists()


@pytest.mark.parametrize("name", format_names())
def test_formats(name: str) -> None:
    cls = format_class(name)
    assert cls.__name__ == camel(name)
    assert cls.name == name
    assert_documented(cls)
    assert "[" in str(cls.payload_spec.__doc__), "payload_spec states names, shapes and dtypes"
    built = example(cls)
    assert isinstance(built, WeightFormat)
    assert parse_format(built.to_spec()) == built
    assert cls.from_dict(built.to_dict()) == built
    assert (ROOT / "tests" / "ir" / "formats" / f"test_{name}.py").exists()


@pytest.mark.parametrize("name", sorted(RULES))
def test_axis_rules(name: str) -> None:
    stem = RULES[name].__module__.rpartition(".")[2]
    twin = ROOT / "tests" / "ir" / "axis_rules" / f"test_{stem}.py"
    if name != "pointwise":  # the rule of every operator that torch tags as element-wise
        assert f'"{name.removesuffix(".self_int")}"' in twin.read_text(encoding="utf-8"), f"{relative(twin)} has no case for {name}"


def fast_paths() -> list[Path]:
    targets = (p for p in (ROOT / "codegen").iterdir() if p.is_dir())
    return sorted(p for target in targets for p in target.glob("*.py") if p.stem in format_names())


@pytest.mark.parametrize("path", fast_paths(), ids=relative)
def test_fast_paths_have_twins(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    twin = ROOT / "tests" / "codegen" / path.parent.name
    assert list(twin.glob(f"test_{path.stem}*.py")), f"no test for {relative(path)} in {relative(twin)}"


def test_no_file_is_too_long() -> None:
    lengths = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES if relative(p).split("/")[0] in FOLDERS}
    assert {p: n for p, n in lengths.items() if n > MAX_FILE} == LONG_FILES


def functions(path: Path) -> dict[str, int]:
    """Length in lines of every function of a file, by `path::name`."""
    nodes = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {f"{relative(path)}::{n.name}": (n.end_lineno or n.lineno) - n.lineno + 1 for n in nodes}


def test_no_function_is_too_long() -> None:
    lengths = {name: n for p in SOURCES if relative(p).split("/")[0] in FOLDERS for name, n in functions(p).items()}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION} == LONG_FUNCTIONS


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
