"""Dense weights: exact as they are, rounded once in a narrower type."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import SpecError
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.dense import Dense, FloatType

from ...checks import assert_same
from ...tiny import randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_same_is_exact_in_every_type(dtype: torch.dtype) -> None:
    matrix, fmt = randn(3, 5).to(dtype), Dense()
    payload = fmt.encode(matrix.t().contiguous().t())
    assert payload["values"].is_contiguous()
    assert_same(fmt.decode(payload, 3, 5, dtype), matrix)
    assert fmt.bits_per_weight(3, 5, dtype) == 8 * dtype.itemsize


@pytest.mark.parametrize(("storage", "unit"), [(FloatType.FLOAT16, 2**-11), (FloatType.BFLOAT16, 2**-8), (FloatType.FLOAT32, 0.0)])
def test_narrow_storage_rounds_once(storage: FloatType, unit: float) -> None:
    matrix, fmt = randn(16, 16), Dense(storage=storage)
    payload = fmt.encode(matrix)
    decoded = fmt.decode(payload, 16, 16, torch.float32)
    assert decoded.dtype == torch.float32
    assert bool(((decoded - matrix).abs() <= unit * matrix.abs()).all())
    assert_same(fmt.encode(decoded)["values"], payload["values"])


def test_spec() -> None:
    assert parse_format("dense{storage=float16}") == Dense(storage=FloatType.FLOAT16)
    assert Dense().to_spec() == "dense"
    with pytest.raises(SpecError, match=r"expected one of .* got 'float61' \(did you mean 'float16'\?\)"):
        parse_format("dense{storage=float61}")
