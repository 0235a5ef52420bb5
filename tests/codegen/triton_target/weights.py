"""Random weights taken apart, together with what they mean in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.codegen.triton_target.layout import Values
from fxpress.codegen.triton_target.pack import Source

EITHER = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]  # every structure and kind runs in both in test_launch.py
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    """Independent presence, `[rows, columns] bool`."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def kept_of_group(rows: int, columns: int, keep: int, group: int, seed: int = 0) -> Tensor:
    """Exactly `keep` of every `group` columns (a short last group loses its tail)."""
    order = torch.rand(rows, -(-columns // group), group, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < keep).flatten(1)[:, :columns]


def random_source(kind: Values, dtype: torch.dtype, present: Tensor, group: int | None = None, seed: int = 1, **tables: Any) -> tuple[Source, Tensor]:
    """A source of `kind` and the weight `[rows, columns] float64` that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = present.shape
    if kind is Values.HALF:
        values = torch.randn(rows, columns, generator=generator).to(dtype)
        return Source(kind=kind, values=values, dtype=dtype, present=present), values.double() * present
    entries = tables.get("entries", 16)
    codes = torch.randint(0, 2**kind.bits if kind in (Values.CODE4, Values.CODE8) else entries, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, -(-columns // group) if group else 1, generator=generator) + 0.5
    zero = table = None
    if kind in (Values.CODE4, Values.CODE8):
        zero = torch.randint(0, 2**kind.bits, scale.shape, generator=generator).float()
        value = codes.double() - _spread(zero, group, columns)
    elif kind is Values.SHARED:
        table = torch.randn(1, entries, generator=generator).to(dtype)
        value = table[0].double()[codes.long()]
    else:
        table = torch.randint(-127, 128, (rows, entries), generator=generator).to(torch.int8)
        value = table.double().gather(1, codes.long())
    source = Source(kind=kind, values=codes, dtype=dtype, present=present, scale=scale, zero=zero, table=table, group=group)
    return source, value * _spread(scale, group, columns) * present


def _spread(grid: Tensor, group: int | None, columns: int) -> Tensor:
    return grid.double().repeat_interleave(group or columns, 1)[:, :columns]
