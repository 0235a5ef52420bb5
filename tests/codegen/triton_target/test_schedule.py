"""Splits fill a GPU that a small weight would leave idle, and stop where they would only add partial sums."""

from __future__ import annotations

import pytest
import torch

from fxpress.codegen.triton_target.layout import Structure, Tile, Values
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.schedule import Schedule, schedule_for

from .weights import random_source


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "expected"),
    [
        (128, 4096, 1, Schedule(tokens=8, splits=8)),  # 2 programs: as many splits as allowed
        (128, 1024, 20, Schedule(tokens=32, splits=2)),  # 8 tiles along K: no more than 2 splits
        (128, 256, 64, Schedule(tokens=64, splits=1)),  # too few tiles to split
        (16384, 8192, 130, Schedule(tokens=64, splits=2)),  # 256 x 3 programs for 864
    ],
)
def test_the_rule(rows: int, columns: int, tokens: int, expected: Schedule) -> None:
    packed = pack(random_source(Values.CODE4, torch.float16, torch.ones(rows, columns, dtype=torch.bool))[0], Structure.DENSE, Tile())
    assert schedule_for(packed, tokens, multiprocessors=108) == expected
