"""What packing refuses, and how much it stores."""

from __future__ import annotations

import pytest
import torch

from fxpress.codegen.triton_target.layout import Structure, Tile, Values
from fxpress.codegen.triton_target.pack import Source, pack
from fxpress.ir.errors import LowerError

from .weights import kept_of_group, random_mask, random_source


def _bits(source: Source, structure: Structure) -> float:
    packed = pack(source, structure, Tile())
    return 8 * packed.nbytes / (packed.rows * packed.columns)


def test_bits_per_weight_at_half_density() -> None:
    mask = kept_of_group(256, 512, 16, 32)
    half, four = random_source(Values.HALF, torch.float16, mask)[0], random_source(Values.CODE4, torch.float16, mask)[0]
    assert _bits(half, Structure.BALANCED) == 9.0
    assert _bits(half, Structure.BITMAP) == pytest.approx(9.5, abs=0.05)  # places of words: half a bit
    assert _bits(four, Structure.BALANCED) == pytest.approx(3.0 + 64 / 512)  # float32 scales: two words a row
    assert _bits(random_source(Values.HALF, torch.float16, kept_of_group(256, 512, 2, 4))[0], Structure.TWO_OF_FOUR) == pytest.approx(9.0, abs=0.01)


def test_room_follows_the_densest_tile() -> None:
    mask = random_mask(128, 256, 0.1)
    assert pack(random_source(Values.HALF, torch.float16, mask)[0], Structure.BITMAP, Tile()).pairs == 512
    mask[:64, :128] = True
    assert pack(random_source(Values.HALF, torch.float16, mask)[0], Structure.BITMAP, Tile()).pairs == 8192


def test_tiles_are_no_wider_than_groups() -> None:
    source = random_source(Values.CODE4, torch.float16, torch.ones(8, 256, dtype=torch.bool), group=64)[0]
    packed = pack(source, Structure.DENSE, Tile())
    assert packed.tile.columns == 64 and packed.group == 1 and packed.groups == 4
    with pytest.raises(LowerError, match="groups of 48 columns"):
        pack(random_source(Values.CODE4, torch.float16, torch.ones(8, 96, dtype=torch.bool), group=48)[0], Structure.DENSE, Tile())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LowerError, match="more than two"):
        pack(random_source(Values.HALF, torch.float16, torch.ones(8, 64, dtype=torch.bool))[0], Structure.TWO_OF_FOUR, Tile())
    with pytest.raises(LowerError, match="2:4 with tables"):
        pack(random_source(Values.SHARED, torch.float16, kept_of_group(8, 64, 2, 4))[0], Structure.TWO_OF_FOUR, Tile())
