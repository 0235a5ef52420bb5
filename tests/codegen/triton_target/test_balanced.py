"""Balanced weights for the kernels: exact with every kind of value, tables of rows too."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxpress.codegen.triton_target.balanced import BalancedPath
from fxpress.codegen.triton_target.layout import Structure
from fxpress.ir.formats.balanced import Balanced

from .sparse_checks import COLUMNS, ROWS, VALUES, check
from .weights import EITHER

WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", EITHER)
@pytest.mark.parametrize("values", [*VALUES, "lut{entries=16}"])
def test_packing_changes_no_value(values: str, dtype: torch.dtype) -> None:
    check(BalancedPath(), Balanced(values=values), WEIGHT, Structure.BALANCED, dtype)


@pytest.mark.parametrize(("keep", "group"), [(8, 32), (12, 32), (4, 8), (3, 24), (31, 32)])
def test_any_balance(keep: int, group: int) -> None:
    check(BalancedPath(), Balanced(keep=keep, group=group), WEIGHT, Structure.BALANCED)
