"""N:M weights for the kernels: 2:4 by byte permutes, everything else as balanced words."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxpress.codegen.triton_target.layout import Structure
from fxpress.codegen.triton_target.nm import NmPath
from fxpress.ir.formats.nm import Nm

from .sparse_checks import COLUMNS, ROWS, VALUES, check
from .weights import EITHER

WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", EITHER)
@pytest.mark.parametrize("values", [*VALUES, "lut{entries=16}"])
def test_packing_changes_no_value(values: str, dtype: torch.dtype) -> None:
    check(NmPath(), Nm(values=values), WEIGHT, Structure.BALANCED if "lut" in values else Structure.TWO_OF_FOUR, dtype)


@pytest.mark.parametrize(("keep", "group"), [(1, 4), (4, 8), (8, 16), (1, 2)])
def test_any_pattern(keep: int, group: int) -> None:
    check(NmPath(), Nm(keep=keep, group=group), WEIGHT, Structure.BALANCED)
