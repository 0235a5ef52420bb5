"""Bitmap weights for the kernels: exact with every kind of value, and row tables refused with a way out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxpress.codegen.target import No
from fxpress.codegen.triton_target.bitmap import BitmapPath
from fxpress.codegen.triton_target.layout import Structure
from fxpress.ir.formats.bitmap import Bitmap

from .sparse_checks import COLUMNS, ROWS, VALUES, answer, check
from .weights import EITHER, random_mask

WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * random_mask(ROWS, COLUMNS, 0.45)
COUNT = int((WEIGHT != 0).sum())


@pytest.mark.parametrize("dtype", EITHER)
@pytest.mark.parametrize("values", VALUES)
def test_packing_changes_no_value(values: str, dtype: torch.dtype) -> None:
    check(BitmapPath(), Bitmap(count=COUNT, values=values), WEIGHT, Structure.BITMAP, dtype)


def test_what_cannot_be_read_is_refused() -> None:
    rows = answer(BitmapPath(), f"bitmap{{count={COUNT},values='lut{{entries=16}}'}}", WEIGHT)
    assert isinstance(rows, No) and "rows_per_table=none" in rows.reason
    groups = answer(BitmapPath(), f"bitmap{{count={COUNT},values='affine{{bits=4,group_size=20}}'}}", WEIGHT)
    assert isinstance(groups, No) and "no whole tiles" in groups.reason
    narrow = answer(BitmapPath(), f"bitmap{{count={COUNT},values='dense{{storage=bfloat16}}'}}", WEIGHT)
    assert isinstance(narrow, No) and "values stored as torch.bfloat16" in narrow.reason
