"""Sparse formats through the Triton paths: packed weights decode as the formats do."""

from __future__ import annotations

import torch
from torch import Tensor

from fxpress.codegen.target import Support, Yes
from fxpress.codegen.triton_target.launch import decode
from fxpress.codegen.triton_target.layout import Structure, Tile
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.path import Stored
from fxpress.codegen.triton_target.sparse_source import SparsePath
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.sparse import Sparse

from .weights import DEVICE

ROWS, COLUMNS = 20, 160
VALUES = ("dense", "affine{bits=4}", "affine{bits=4,group_size=32,symmetric=true}", "affine{bits=8,group_size=64}", "lut{entries=16,rows_per_table=none}")


def stored(fmt: Sparse, matrix: Tensor, dtype: torch.dtype) -> Stored:
    """`matrix` in `fmt`, rounded by its inner format first."""
    whole = fmt.inner.encode(matrix.to(dtype))
    return Stored(format=fmt, payload=fmt.pack(fmt.choose(matrix), whole), rows=ROWS, columns=COLUMNS, dtype=dtype)


def check(path: SparsePath, fmt: Sparse, matrix: Tensor, structure: Structure, dtype: torch.dtype = torch.float16) -> None:
    """The path takes the weight, for `structure`, and packing it changes no value."""
    held = stored(fmt, matrix, dtype)
    assert isinstance(path.supports(held), Yes)
    source, found = path.source(held)
    assert found is structure
    packed = pack(source, found, Tile(rows=16, columns=64)).to(DEVICE)
    assert torch.equal(decode(packed).cpu(), fmt.decode(held.payload, ROWS, COLUMNS, dtype))


def answer(path: SparsePath, spec: str, matrix: Tensor, dtype: torch.dtype = torch.float16) -> Support:
    """What the path says about `matrix` in the format `spec`."""
    fmt = parse_format(spec)
    assert isinstance(fmt, Sparse)
    return path.supports(stored(fmt, matrix, dtype))
