"""Affine payloads taken apart mean the same, and what the kernels cannot read is refused with a reason."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxpress.codegen.target import No, Yes
from fxpress.codegen.triton_target.affine import AffinePath
from fxpress.codegen.triton_target.launch import decode
from fxpress.codegen.triton_target.layout import Structure, Tile
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.path import Stored
from fxpress.ir.formats.affine import Affine, Granularity, ScaleType

from .weights import DEVICE, EITHER

WEIGHT = torch.randn(20, 160, generator=torch.Generator().manual_seed(0))


def _stored(fmt: Affine, dtype: torch.dtype = torch.float16) -> Stored:
    return Stored(format=fmt, payload=fmt.encode(WEIGHT), rows=20, columns=160, dtype=dtype)


@pytest.mark.parametrize("dtype", EITHER)
@pytest.mark.parametrize(
    "fmt",
    [
        Affine(bits=4),
        Affine(bits=4, group_size=64),
        Affine(bits=2, group_size=32, symmetric=True),
        Affine(bits=8, group_size=128, scale_dtype=ScaleType.FLOAT32),
        Affine(bits=5, symmetric=True, granularity=Granularity.TENSOR),
        Affine(bits=1),
    ],
    ids=Affine.to_spec,
)
def test_the_packed_weight_decodes_as_the_format_does(fmt: Affine, dtype: torch.dtype) -> None:
    stored = _stored(fmt, dtype)
    assert isinstance(AffinePath().supports(stored), Yes)
    source, structure = AffinePath().source(stored)
    assert structure is Structure.DENSE
    packed = pack(source, structure, Tile(rows=16, columns=64)).to(DEVICE)
    assert torch.equal(decode(packed).cpu(), fmt.decode(stored.payload, 20, 160, dtype))


def test_group_scales_in_half_precision_cost_four_bytes() -> None:
    rows = torch.randn(64, 512)
    fmt = Affine(bits=4, group_size=128)
    source, structure = AffinePath().source(Stored(format=fmt, payload=fmt.encode(rows), rows=64, columns=512, dtype=torch.float16))
    assert 8 * pack(source, structure, Tile()).nbytes / rows.numel() == 4.25


@pytest.mark.parametrize(("fmt", "why"), [(Affine(bits=4, group_size=40), "no whole tiles"), (Affine(bits=1, symmetric=True), "zero point of one half")])
def test_what_cannot_be_read_is_refused(fmt: Affine, why: str) -> None:
    answer = AffinePath().supports(_stored(fmt))
    assert isinstance(answer, No) and why in answer.reason
