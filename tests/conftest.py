"""Shared fixtures: tiny models and their captured programs, built once a session."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched from a model hub
SOURCES = str(Path(__file__).resolve().parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SOURCES, os.environ.get("PYTHONPATH"))))  # for the processes that tests start
settings.register_profile("fxpress", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fxpress")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

from fxpress.ir.program import Program  # noqa: E402

from . import grouping, torchlib  # noqa: E402
from .tiny import TinyModel, fresh_program, tiny  # noqa: E402


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], TinyModel]:
    """`zoo(name)`: a tiny model with its inputs; shared, so leave it as it is."""
    return tiny


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Program]:
    """`captured(name)`: a program of the tiny model, free to edit (a clone of one capture a session)."""
    return fresh_program


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random numbers depend on the test's name alone, not on which tests ran before it in the same process."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _torchlib() -> None:
    torchlib.remember()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadgroup` as `grouping` says."""
    return grouping.scheduler(config, log) if config.getoption("dist") == "loadgroup" else None
