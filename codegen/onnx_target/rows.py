"""The row form of affine weights: packed `uint8` rows that plain ONNX operators unpack, all rows or only gathered ones.

Codes of 1, 2, 4 or 8 bits (others in the next larger container) are packed in planes: with L codes a byte, byte p of a row holds the
columns p, P + p, 2 P + p, ... (P bytes a row), lowest bits first. Unpacking is then one shift and mask a plane and one Concat, which
measured as fast as the contrib operator GatherBlockQuantized and 5x faster than interleaved codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ir.formats.affine import Affine, Granularity
from ...ir.weights import storage_key
from .path import Slot

if TYPE_CHECKING:
    import onnx_ir

    from .writer import Writer


def row_container(bits: int) -> int:
    """Smallest of 1, 2, 4, 8 that holds codes of `bits` bits."""
    return next(b for b in (1, 2, 4, 8) if b >= bits)


def row_tables(slot: Slot) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value | None]:
    """Stored codes `[N, ceil(K/L)] uint8`, scales `[N, G]` and zero points `[N, ceil(G/L)] uint8` (per tensor: scalars; symmetric: None)."""
    site, write = slot.site, slot.writer
    fmt, payload = _format(slot), site.payload()
    key = (storage_key(payload["codes"]), "rows", fmt)
    codes, _, zero = fmt.unpack(payload, site.rows, site.columns)
    tensor = fmt.sharing is Granularity.TENSOR
    stored = write.tensor(site.tensors[0], planes(codes, fmt.bits), key)
    scale = write.tensor(site.tensors[1], payload["scale"].reshape(()) if tensor else payload["scale"], (*key, "scale"))
    if fmt.symmetric:
        return stored, scale, None
    zeros = zero.to(torch.uint8)
    return stored, scale, write.tensor(site.tensors[2], zeros.reshape(()) if tensor else planes(zeros, fmt.bits), (*key, "zero"))


def row_weight(slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value:
    """The decoded weight in the model's dtype: rows `[..., K]` at `ids`, or all of it `[N, K]`; computed in float32."""
    import onnx_ir as ir

    site, write, fmt = slot.site, slot.writer, _format(slot)
    tensor = fmt.sharing is Granularity.TENSOR

    def pick(table: onnx_ir.Value) -> onnx_ir.Value:
        return table if ids is None else write.op("Gather", table, ids, axis=0)

    def spread(groups: onnx_ir.Value) -> onnx_ir.Value:
        """`[..., G]` as `[..., K]` (or `[..., 1]`, which broadcasts)."""
        return groups if tensor or count == 1 else write.op("Gather", groups, _columns(write, fmt, site.columns), axis=-1)

    count = fmt.grid(site.rows, site.columns)[1]
    codes, scale, zero = row_tables(slot)
    value = _float(write, unpack_planes(write, pick(codes), fmt.bits, site.columns))
    if zero is None:
        zeros = write.constant(torch.tensor(fmt.fixed_zero))
    else:
        zeros = spread(_float(write, zero if tensor else unpack_planes(write, pick(zero), fmt.bits, count)))
    scales = spread(_float(write, scale if tensor else pick(scale)))
    weight = write.op("Mul", write.op("Sub", value, zeros), scales)
    return write.op("Cast", weight, to=ir.DataType.FLOAT16.value) if site.dtype is torch.float16 else weight


def planes(codes: Tensor, bits: int) -> Tensor:
    """`codes: [N, C] uint8` -> `[N, ceil(C/L)] uint8`, L codes a byte in planes."""
    width = row_container(bits)
    lanes = 8 // width
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % lanes)).reshape(codes.shape[0], lanes, -1)
    packed = padded[:, 0].clone()
    for lane in range(1, lanes):
        packed |= padded[:, lane] << (lane * width)
    return packed


def unpack_planes(write: Writer, packed: onnx_ir.Value, bits: int, count: int) -> onnx_ir.Value:
    """`[..., P] uint8` -> codes `[..., count] uint8`."""
    width = row_container(bits)
    lanes = 8 // width
    if lanes == 1:
        return packed
    mask = write.constant(torch.tensor(2**width - 1, dtype=torch.uint8))
    parts = []
    for lane in range(lanes):
        shifted = packed if lane == 0 else write.op("BitShift", packed, write.constant(torch.tensor(lane * width, dtype=torch.uint8)), direction="RIGHT")
        parts.append(write.op("BitwiseAnd", shifted, mask) if lane < lanes - 1 else shifted)
    codes = write.op("Concat", *parts, axis=-1)
    return codes if count % lanes == 0 else write.op("Slice", codes, write.numbers(0), write.numbers(count), write.numbers(-1))


def _columns(write: Writer, fmt: Affine, columns: int) -> onnx_ir.Value:
    """`[K] int32`: the group of every column."""
    return write.constant(torch.arange(columns, dtype=torch.int32) // fmt.group_width(columns))


def _float(write: Writer, value: onnx_ir.Value) -> onnx_ir.Value:
    import onnx_ir as ir

    return value if value.dtype == ir.DataType.FLOAT else write.op("Cast", value, to=ir.DataType.FLOAT.value)


def _format(slot: Slot) -> Affine:
    fmt = slot.site.format
    assert isinstance(fmt, Affine)
    return fmt
