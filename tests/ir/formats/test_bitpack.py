"""Bit packing: a bijection, in the layout it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpress.ir.formats.bitpack import pack, packed_width, unpack

from ...checks import assert_same


def naive(codes: list[int], bits: int) -> list[int]:
    """The bit stream written out: code i in bits `[i*b, (i+1)*b)`, lowest first, bytes little-endian."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    return [(stream >> (8 * i)) & 255 for i in range(packed_width(len(codes), bits))]


@given(st.data(), st.integers(1, 8), st.integers(1, 40))
def test_layout_is_the_stated_bit_stream(data: st.DataObject, bits: int, count: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.tolist() == [naive(codes, bits)]
    assert unpack(packed, bits, count).tolist() == [codes]


@given(st.data(), st.integers(1, 8))
def test_pack_inverts_unpack_on_whole_bytes(data: st.DataObject, bits: int) -> None:
    width = bits * data.draw(st.integers(1, 4))  # every bit of these bytes belongs to a code
    raw = data.draw(st.binary(min_size=width, max_size=width))
    packed = torch.tensor([list(raw)], dtype=torch.uint8)
    assert_same(pack(unpack(packed, bits, 8 * width // bits), bits), packed)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 13), (2, 3, 16), (5, 1), (1,)])
def test_any_rank_and_integer_type(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    assert_same(unpack(packed, bits, shape[-1]).long(), codes)


def test_no_unused_bits_but_in_the_last_byte() -> None:
    assert [packed_width(16, b) for b in range(1, 9)] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert packed_width(9, 3) == 4
