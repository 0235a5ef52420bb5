"""Tests of one model, or of one file, run in one worker."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from .conftest import pytest_xdist_make_scheduler
from .grouping import group


def test_a_model_among_the_parameters_names_the_group_and_else_the_file() -> None:
    assert group("tests/ir/test_resize.py::test_removal_is_masking[llama]") == "llama"
    assert group("tests/passes/test_slice.py::test_it[quantize_lut{bits=3}-bert]") == group("tests/a.py::test_b[bert-True]") == "bert"
    assert group("tests/a.py::test_b[2]") == group("tests/a.py::test_c") == "tests/a.py"


def test_the_scheduler_of_make_test_goes_by_these_groups() -> None:
    pytest.importorskip("xdist")
    config = SimpleNamespace(getoption={"dist": "loadgroup"}.get, getvalue={"tx": ["popen"], "px": []}.get)
    assert pytest_xdist_make_scheduler(config, SimpleNamespace(loadscopesched=None))._split_scope("tests/a.py::test_b[vit]") == "vit"  # type: ignore[arg-type]
    config.getoption = {"dist": "load"}.get
    assert pytest_xdist_make_scheduler(config, None) is None  # type: ignore[arg-type]
