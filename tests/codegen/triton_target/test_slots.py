"""Outliers in slots: every one is added once, wherever it stands, with any structure and any split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxpress.codegen.triton_target.layout import Structure, Values
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.slots import CHUNK, Outliers, slots_of
from fxpress.ir.errors import LowerError

from .test_launch import COLUMNS, ROWS, SMALL, check
from .weights import EITHER, kept_of_group, random_mask, random_source

EMPTY = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)


def _places(kind: str) -> Tensor:
    mask = EMPTY.clone()
    if kind == "few":
        return random_mask(ROWS, COLUMNS, 0.01, seed=5)
    if kind == "corners":
        mask[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    elif kind == "one row":
        mask[17] = True  # the second row of tiles holds more than two chunks, the first none
    else:
        mask |= True
    return mask


def _outliers(mask: Tensor, dtype: torch.dtype) -> tuple[Outliers, Tensor]:
    row, column = mask.nonzero(as_tuple=True)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(2))
    value = (16 * torch.randn(len(row), generator=torch.Generator().manual_seed(3))).to(dtype)
    exact = torch.zeros(mask.shape, dtype=torch.float64).index_put((row[order], column[order]), value.double())
    return Outliers(row=row[order], column=column[order], value=value), exact


@pytest.mark.parametrize("dtype", EITHER)
@pytest.mark.parametrize("kind", ["few", "corners", "one row", "all"])
def test_outliers_over_a_table(kind: str, dtype: torch.dtype) -> None:
    """The other part is zero at these places, so that decoding stays exact."""
    mask = _places(kind)
    outliers, exact = _outliers(mask, dtype)
    source, weight = random_source(Values.SHARED, dtype, ~mask)
    zeroed = replace(source, table=source.table.index_fill(1, torch.tensor([0]), 0.0))  # type: ignore[union-attr]
    codes = source.values.masked_fill(mask, 0)
    weight = weight * (source.values != 0)
    check(replace(zeroed, values=codes, present=None, outliers=outliers), weight + exact, Structure.DENSE, splits=2)


@pytest.mark.parametrize("structure", list(Structure))
@pytest.mark.parametrize("splits", [1, 3])
def test_outliers_over_every_structure(structure: Structure, splits: int) -> None:
    present = {Structure.DENSE: ~EMPTY, Structure.TWO_OF_FOUR: kept_of_group(ROWS, COLUMNS, 2, 4)}.get(structure, random_mask(ROWS, COLUMNS, 0.5))
    outliers, exact = _outliers(_places("few") & ~present if structure is not Structure.DENSE else EMPTY, torch.float16)
    source, weight = random_source(Values.HALF, torch.float16, present)
    check(replace(source, outliers=outliers), weight + exact, structure, splits=splits, tokens=17)


def test_without_outliers_nothing_is_stored() -> None:
    source, _ = random_source(Values.HALF, torch.float16, ~EMPTY)
    assert all(t.numel() == 0 for t in pack(source, Structure.DENSE, SMALL).tensors[-3:])


def test_slots_are_whole_chunks_in_order() -> None:
    outliers, _ = _outliers(_places("one row"), torch.float16)
    slots = slots_of(outliers, ROWS, COLUMNS, 16)
    assert slots["slot_starts"].tolist() == [0, 0, -(-COLUMNS // CHUNK)]
    filled = slots["slots"][slots["slots"] >= 0]
    assert (filled & 0xFFFFFF).tolist() == list(range(COLUMNS)) and set((filled >> 24).tolist()) == {1}


def test_a_row_of_tiles_too_high_for_a_slot_is_refused() -> None:
    outliers, _ = _outliers(_places("few"), torch.float16)
    with pytest.raises(LowerError, match="tiles of 256 rows"):
        slots_of(outliers, ROWS, COLUMNS, 256)
