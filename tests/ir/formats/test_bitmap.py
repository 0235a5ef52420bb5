"""Bitmaps hold any weight exactly, at any density, and count every byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpress.ir.errors import FormatError
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.bitmap import Bitmap

from .sparse_cases import DENSITIES, INNER, SHAPES, weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_values_round_trip(shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    matrix = weight(*shape, density).to(dtype)
    fmt = Bitmap(count=int((matrix != 0).sum()))
    payload = fmt.encode(matrix)
    fmt.check_payload(payload, *shape, dtype, "here")
    assert torch.equal(fmt.decode(payload, *shape, dtype), matrix)
    present, inner = fmt.unpack(payload, *shape, dtype)
    assert torch.equal(present, matrix != 0) and torch.equal(inner["values"], matrix)


@pytest.mark.parametrize("values", INNER)
@pytest.mark.parametrize("density", DENSITIES)
def test_dropping_codes_of_zeros_changes_nothing(values: str, density: float) -> None:
    inner, matrix = parse_format(values), weight(33, 100, density)
    quantized = inner.encode(matrix)
    before = inner.decode(quantized, 33, 100, torch.float32)
    present = before != 0
    fmt = Bitmap(count=int(present.sum()), values=values)
    payload = fmt.pack(present, quantized)
    fmt.check_payload(payload, 33, 100, torch.float32, "here")
    assert torch.equal(fmt.decode(payload, 33, 100, torch.float32), before)
    _, whole = fmt.unpack(payload, 33, 100, torch.float32)
    if "affine" in values or not bool((before == 0).any()):
        assert torch.equal(inner.decode(whole, 33, 100, torch.float32), before), "the inner format alone says the same"


def test_bits_per_weight_count_everything() -> None:
    assert Bitmap(count=2048).bits_per_weight(64, 64, torch.float16) == 9.0
    assert Bitmap(count=2048, values="affine{bits=4}").bits_per_weight(64, 64, torch.float16) == 1 + 2 + (16 + 8) / 64


@given(st.integers(0, 64))
def test_encoding_keeps_the_largest(count: int) -> None:
    matrix = weight(4, 16, 1.1)
    decoded = Bitmap(count=count).decode(Bitmap(count=count).encode(matrix), 4, 16, torch.float32)
    assert int((decoded != 0).sum()) == count
    assert count in (0, 64) or float(decoded[decoded != 0].abs().min()) >= float(matrix[decoded == 0].abs().max())


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(FormatError, match="keeps 1 weights, expected 3"):
        Bitmap(count=3).pack(torch.eye(4, dtype=torch.bool)[:1], {"values": torch.ones(1, 4)})
    with pytest.raises(FormatError, match="expected dense, affine"):
        Bitmap(count=3, values="sparse_outliers{count=2}")
    assert Bitmap(count=17).why_illegal(4, 4) == "count=17 is more than the 16 weights; use count <= 16"
    assert "group_size" in str(Bitmap(count=1, values="affine{bits=4,group_size=64}").why_illegal(4, 32))


def test_it_exports() -> None:
    matrix = weight(8, 32, 0.5)
    fmt = Bitmap(count=int((matrix != 0).sum()), values="affine{bits=4}")
    payload = fmt.pack(matrix != 0, parse_format("affine{bits=4}").encode(matrix))

    class Decode(torch.nn.Module):
        def forward(self, mask: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
            return fmt.decode({"mask": mask, "codes": codes, "scale": scale, "zero_point": zero_point}, 8, 32, torch.float32)

    exported = torch.export.export(Decode(), tuple(payload[k] for k in ("mask", "codes", "scale", "zero_point")))
    assert torch.equal(exported.module()(*(payload[k] for k in ("mask", "codes", "scale", "zero_point"))), fmt.decode(payload, 8, 32, torch.float32))
