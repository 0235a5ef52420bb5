"""Which tests share a worker: those of one tiny model, which is then captured once, else those of one file, whose fixtures are then built once.

xdist's own groups (a mark whose name it appends to the test's) are silently ignored by pytest 9.2: https://github.com/pytest-dev/pytest-xdist/issues/1386
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from .tiny import BUILDERS


def some_slow(names: Iterable[str], *slow: str) -> list[Any]:
    """Parameters for a test of many models, of which `slow` are left to `make test-all`: kin of the others that cost much and show little more."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


def group(nodeid: str) -> str:
    """The model named first among a test's parameters, else its file."""
    path, _, name = nodeid.partition("::")
    parameters = name.partition("[")[2].removesuffix("]").split("-")
    return next((p for p in parameters if p in BUILDERS), path)


def scheduler(config: Any, log: Any) -> Any:
    """Xdist's scheduler of whole groups, those with the most tests first."""
    from xdist.scheduler import LoadScopeScheduling

    made = LoadScopeScheduling(config, log)
    made._split_scope = group
    return made
