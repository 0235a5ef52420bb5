"""Sums with outliers taken apart mean the same, and what the kernels cannot read is refused with a reason."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxpress.codegen.target import No, Yes
from fxpress.codegen.triton_target.composite import CompositePath
from fxpress.codegen.triton_target.launch import decode, matmul
from fxpress.codegen.triton_target.layout import Tile
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.path import Stored
from fxpress.codegen.triton_target.schedule import Schedule
from fxpress.ir.formats.composite import Composite

from .weights import DEVICE, EITHER

WEIGHT = torch.randn(20, 160, generator=torch.Generator().manual_seed(0))
OUTLIERS = "sparse_outliers{count=40}"


def _stored(*parts: str, dtype: torch.dtype = torch.float16) -> Stored:
    fmt = Composite(parts=parts)
    return Stored(format=fmt, payload=fmt.encode(WEIGHT), rows=20, columns=160, dtype=dtype)


@pytest.mark.parametrize("other", ["lut{entries=16}", "lut{entries=8,rows_per_table=none}", "affine{bits=4,group_size=32}"])
@pytest.mark.parametrize("outliers_first", [True, False])
@pytest.mark.parametrize("dtype", EITHER)
def test_the_packed_sum_is_the_formats(other: str, outliers_first: bool, dtype: torch.dtype) -> None:
    """Float16 outliers take two slots in bfloat16."""
    stored = _stored(*((OUTLIERS, other) if outliers_first else (other, OUTLIERS)), dtype=dtype)
    assert isinstance(CompositePath().supports(stored), Yes)
    source, structure = CompositePath().source(stored)
    assert source.outliers is not None and (len(source.outliers.row) == 40) == (dtype is torch.float16)
    packed = pack(source, structure, Tile(rows=16, columns=64)).to(DEVICE)
    exact = stored.format.decode(stored.payload, 20, 160, torch.float64)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(decode(packed).cpu().double(), exact, rtol=eps, atol=eps / 2)
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(matmul(packed, x.to(DEVICE), None, Schedule()).cpu().double(), x.double() @ exact.t(), rtol=eps, atol=2e-3)


def test_what_cannot_be_read_is_refused() -> None:
    def reason(*parts: str) -> str:
        answer = CompositePath().supports(_stored(*parts))
        assert isinstance(answer, No)
        return answer.reason

    assert "0 sparse_outliers and 2 other parts" in reason("dense", "lut{entries=16}")
    assert "torch.float32 outliers are not exact as two torch.float16" in reason("sparse_outliers{count=40,values=float32}", "lut{entries=16}")
    assert "tables of 17 entries" in reason(OUTLIERS, "lut{entries=17}")
    assert "no fast path codegen/triton_target/dense.py" in reason(OUTLIERS, "dense")
