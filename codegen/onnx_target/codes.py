"""Codes of 1 to 8 bits in rows of bytes without unused bits: one set of planes for every power of two in the width (3 bits: 2 + 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rows import planes, unpack_planes

if TYPE_CHECKING:
    import onnx_ir

    from .writer import Writer

StoredCodes = list[tuple["onnx_ir.Value", int]]


def bit_fields(bits: int) -> tuple[int, ...]:
    """Widths 8, 4, 2, 1 that sum to `bits`, the lowest bits' first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def store_codes(write: Writer, name: str, codes: Tensor, bits: int, key: Any) -> StoredCodes:
    """Store `codes: [N, K] uint8` below `2^bits`; for each field its bytes `[N, ceil(K * width / 8)] uint8` and its width."""
    stored, low = [], 0
    for width in bit_fields(bits):
        packed = planes(codes >> low & (2**width - 1), width)
        stored.append((write.tensor(f"{name}_bits_{low}" if low else name, packed, (key, low)), width))
        low += width
    return stored


def read_codes(write: Writer, stored: StoredCodes, count: int, ids: onnx_ir.Value | None) -> onnx_ir.Value:
    """The codes as `[N, count] int32`, or rows `[..., count]` of them at `ids`."""
    import onnx_ir as ir

    codes, low = None, 0
    for packed, width in stored:
        picked = packed if ids is None else write.op("Gather", packed, ids, axis=0)
        field = unpack_planes(write, picked, width, count)
        if low:
            field = write.op("BitShift", field, write.constant(torch.tensor(low, dtype=torch.uint8)), direction="LEFT")
        codes = field if codes is None else write.op("BitwiseOr", codes, field)
        low += width
    assert codes is not None
    return write.op("Cast", codes, to=ir.DataType.INT32.value)
