"""Words, codes and places against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpress.codegen.triton_target.layout import (
    Tile,
    Values,
    by_eight_rows,
    byte_selectors,
    cut,
    fragment_order,
    kept_first,
    presence_words,
    stored_words,
    two_of_four,
    two_of_four_mask,
    values_by_lanes,
)
from fxpress.ir.errors import LowerError

from .weights import random_mask


def test_cut_pads_with_zeros_and_keeps_tiles_together() -> None:
    matrix = torch.arange(1, 7 * 70 + 1).reshape(7, 70)
    tiles = cut(matrix, Tile(rows=4, columns=32))
    assert tiles.shape == (2, 3, 4, 32)
    assert torch.equal(tiles[1, 2, 1, :6], matrix[5, 64:]) and int(tiles[1, 2, 1, 6:].sum() + tiles[1, :, 3].sum()) == 0


@given(st.integers(0, 2**32 - 1))
def test_presence_words_hold_a_bit_a_column(word: int) -> None:
    present = torch.tensor([(word >> j) & 1 for j in range(32)]).bool()
    assert int(presence_words(present)) & 0xFFFFFFFF == word


@pytest.mark.parametrize("kind", [Values.CODE4, Values.CODE8])
def test_a_shift_and_a_mask_give_neighbours(kind: Values) -> None:
    codes = torch.randint(0, 2**kind.bits, (6, 16), dtype=torch.uint8)
    words = stored_words(codes, kind).to(torch.int64)
    mask, count = 2**kind.bits - 1, 16 // kind.bits
    for pair in range(8):
        word = words[:, pair // count] >> (kind.bits * (pair % count))
        assert torch.equal(word & mask, codes[:, 2 * pair].long()) and torch.equal((word >> 16) & mask, codes[:, 2 * pair + 1].long())


def test_codes_into_tables_keep_their_order() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    for kind in (Values.SHARED, Values.ROWS):
        assert [hex(w & 0xFFFFFFFF) for w in stored_words(codes, kind).tolist()] == ["0x76543210", "0xfedcba98"]


def test_kept_values_come_first_and_in_order() -> None:
    values, present = torch.arange(1, 33).reshape(4, 8), random_mask(4, 8, 0.5)
    kept = kept_first(values, present, 8)
    for row in range(4):
        expected = values[row][present[row]].tolist()
        assert kept[row].tolist() == expected + [0] * (8 - len(expected))


@given(st.lists(st.sampled_from([(), (0,), (3,), (0, 1), (1, 3), (2, 3), (0, 3)]), min_size=8, max_size=8))
def test_two_of_four_holds_every_present_column(groups: list[tuple[int, ...]]) -> None:
    present = torch.tensor([[j in group for j in range(4)] for group in groups]).flatten()
    taken = two_of_four_mask(two_of_four(present)).unflatten(-1, (8, 4))
    assert bool((taken | ~present.unflatten(-1, (8, 4))).all()) and bool((taken.sum(-1) == 2).all())


def test_more_than_two_of_four_is_refused() -> None:
    with pytest.raises(LowerError, match="more than two"):
        two_of_four(torch.ones(32, dtype=torch.bool))


def test_selectors_put_the_kept_pair_in_its_columns() -> None:
    table = byte_selectors(torch.device("cpu"))
    for first, second in [(0, 1), (0, 3), (1, 2), (2, 3)]:
        selector = int(table[first | second << 2]) & 0xFFFFFFFF
        columns = [(selector >> (8 * j)) & 0xFF for j in range(4)]
        assert columns == [0x10 if j == first else 0x32 if j == second else 0x44 for j in range(4)]


@pytest.mark.parametrize(("rows", "columns", "bits"), [(64, 128, 4), (128, 64, 8), (32, 32, 4), (64, 128, 16)])
def test_fragments_stand_as_lanes_of_the_matrix_instruction_hold_them(rows: int, columns: int, bits: int) -> None:
    """PTX, mma.m16n8k16, A: lane 4 r + c has (r, 2c), (r, 2c + 1), (r + 8, same), (r, 2c + 8), ... of every 16 x 16 block."""
    tile = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    stored = torch.stack([fragment_order(tile[..., i], bits) for i in (0, 1)], -1)
    assert len({tuple(place) for place in stored.tolist()}) == rows * columns, "every weight once"
    chunk = min(columns, max(32, 256 // bits))
    lanes = stored.unflatten(0, (columns // chunk, rows // 16, 32, -1))
    for lane in (0, 5, 31):
        row, column = lane // 4, 2 * (lane % 4)
        assert set(lanes[0, 0, lane, :, 0].tolist()) == {row, row + 8}
        assert {c % 8 for c in lanes[0, 0, lane, :, 1].tolist()} == {column, column + 1}
    assert lanes[0, 0, 5, :4].tolist() == [[1, 2], [1, 3], [1, 10], [1, 11]]


def test_the_same_word_of_eight_rows_stands_together() -> None:
    words = torch.arange(16 * 4).reshape(16, 4, 1)
    assert by_eight_rows(words).flatten().tolist()[:9] == [0, 4, 8, 12, 16, 20, 24, 28, 1]


@pytest.mark.parametrize(("places", "bits"), [(16, 16), (16, 4), (8, 4)])
def test_a_lane_loads_the_values_of_its_own_words(places: int, bits: int) -> None:
    words, lanes = 256, 128
    owner = (torch.arange(words) % lanes).unsqueeze(-1).expand(words, places)
    loads = values_by_lanes(owner, bits).unflatten(0, (-1, min(128, words // lanes * places * bits) // bits))
    assert (loads == loads[:, :1]).all(), "16 bytes belong to one lane"
    assert loads[:lanes, 0].tolist() == list(range(lanes)), "lanes side by side load side by side"
