"""Learned tables taken apart mean the same, and what the kernels cannot read is refused with a reason."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxpress.codegen.target import No, Yes
from fxpress.codegen.triton_target.launch import decode
from fxpress.codegen.triton_target.layout import Tile, Values
from fxpress.codegen.triton_target.lut import LutPath
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.path import Stored
from fxpress.ir.formats.lut import Lut, TableType

from .weights import DEVICE, EITHER

WEIGHT = torch.randn(20, 160, generator=torch.Generator().manual_seed(0))


def _stored(fmt: Lut, dtype: torch.dtype = torch.float16) -> Stored:
    return Stored(format=fmt, payload=fmt.encode(WEIGHT), rows=20, columns=160, dtype=dtype)


@pytest.mark.parametrize("dtype", EITHER)
@pytest.mark.parametrize(
    ("fmt", "kind"),
    [
        (Lut(entries=16), Values.ROWS),
        (Lut(entries=8), Values.ROWS),
        (Lut(entries=4, rows_per_table=8), Values.ROWS),
        (Lut(entries=16, rows_per_table=None), Values.SHARED),
        (Lut(entries=5, rows_per_table=None), Values.SHARED),
    ],
)
def test_the_packed_weight_decodes_as_the_format_does(fmt: Lut, kind: Values, dtype: torch.dtype) -> None:
    stored = _stored(fmt, dtype)
    assert isinstance(LutPath().supports(stored), Yes)
    source, structure = LutPath().source(stored)
    assert source.kind is kind
    packed = pack(source, structure, Tile(rows=16, columns=64)).to(DEVICE)
    assert torch.equal(decode(packed).cpu(), fmt.decode(stored.payload, 20, 160, dtype))


def test_float_tables_need_a_dtype_that_holds_them() -> None:
    shared = Lut(entries=16, rows_per_table=None, table=TableType.FLOAT16)
    assert isinstance(LutPath().supports(_stored(shared)), Yes)
    answer = LutPath().supports(_stored(shared, torch.bfloat16))
    assert isinstance(answer, No) and "not exact in torch.bfloat16" in answer.reason


@pytest.mark.parametrize(("fmt", "why"), [(Lut(entries=17), "tables of 17 entries"), (Lut(entries=16, table=TableType.FLOAT16), "row tables of float16")])
def test_what_cannot_be_read_is_refused(fmt: Lut, why: str) -> None:
    answer = LutPath().supports(_stored(fmt))
    assert isinstance(answer, No) and why in answer.reason
