"""Splits fill a GPU that a small weight would leave idle, and stop where they would only add partial sums."""

from __future__ import annotations

import pytest
import torch

from fxpress.codegen.triton_target.layout import Structure, Tile, Values
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.schedule import Schedule, schedule_for

from .weights import random_source


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "multiprocessors", "expected"),
    [
        (128, 4096, 1, 108, Schedule(tokens=8, splits=8)),  # 2 programs: as many splits as allowed
        (128, 1024, 20, 108, Schedule(tokens=32, splits=2)),  # 8 tiles along K: no more than 2 splits
        (128, 256, 64, 108, Schedule(tokens=64, splits=1)),  # too few tiles to split
        (2048, 1024, 130, 14, Schedule(tokens=64, splits=2)),  # 32 x 3 programs for 112
    ],
)
def test_the_rule(rows: int, columns: int, tokens: int, multiprocessors: int, expected: Schedule) -> None:
    packed = pack(random_source(Values.CODE4, torch.float16, torch.ones(rows, columns, dtype=torch.bool))[0], Structure.DENSE, Tile())
    assert schedule_for(packed, tokens, multiprocessors=multiprocessors) == expected
