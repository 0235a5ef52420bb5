"""Learned tables in ONNX: low-bit codes in the file that ONNX Runtime looks up once, when it loads the model.

Tables of 8-bit integers: `GatherElements` makes the codes 8-bit integers, which `DequantizeLinear` with a row's scale and `MatMul` take on. ONNX Runtime 1.32
folds the look-up and fuses the rest to one 8-bit MatMulNBits: the file keeps the low bits, memory holds 8 bits a weight, and no value changes.
Measured on 4096 x 4096, 2 threads, one row, median ms: dense 9.9; this form 0.88 with one scale a row (which becomes blocks of 32), 0.51 in blocks of
128, 0.46 in blocks of 256; stored 8-bit integers 0.86 with one scale a row; the contrib operator written out is no faster. So scales are repeated in
blocks of 128.
Tables of floats are on no such grid: they become dense weights at load. Embeddings look up the gathered rows only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...ir.formats.affine import ScaleType
from ...ir.formats.lut import Lut, TableType
from ...ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ...ir.weights import storage_key
from ..target import No, Support, Yes
from .codes import StoredCodes, bit_fields, read_codes, store_codes
from .layers import cast, convolution, linear, why_shared
from .path import Form, OnnxPath, Slot

if TYPE_CHECKING:
    import onnx_ir

BLOCK = 128
FOLDED_BYTES = 2**30  # ONNX Runtime computes nothing larger when it loads a model, and would look every weight up in every run


class LutPath(OnnxPath):
    """Tables of 2 to 256 entries; see the module's docstring."""

    def supports(self, site: WeightSite) -> Support:
        """Weights that decode to float32 or float16, and whose codes ONNX Runtime expands at load."""
        if site.dtype not in (torch.float32, torch.float16):
            return No(f"the weight decodes to {site.dtype}, and the look-up gives float32 or float16 only")
        if site.kind is not SiteKind.EMBEDDING and 4 * site.parameters > FOLDED_BYTES:
            return No(f"looking up {site.parameters} weights takes more than the 1 GiB that ONNX Runtime computes at load")
        return Yes()

    def emit(self, slot: Slot) -> Form:
        """Write the form that suits the site's kind and table."""
        if slot.site.kind is SiteKind.EMBEDDING:
            return Form(output=self.rows(slot, slot.x), text=f"Gather[{_packed(slot)}] + table look-up", why="touches only the gathered rows")
        if slot.site.kind in CONVOLUTIONS:
            why = "ONNX Runtime looks it up to a dense weight at load and convolves at dense speed"
            return Form(output=convolution(slot, self.rows(slot, None)), text=f"{_packed(slot)} looked up at load + Conv", why=why)
        reason = why_shared(slot) or _why_not_fused(slot.site)
        if reason is None:
            text = f"{_packed(slot)} looked up at load + DequantizeLinear[int8] + MatMul (fused to MatMulNBits by ONNX Runtime)"
            return Form(output=linear(slot, _block_weight(slot), fused=True), text=text, why="8-bit tables: 8 bits a weight in memory", fused=True)
        output = linear(slot, slot.writer.op("Transpose", self.rows(slot, None), perm=[1, 0]))
        return Form(output=output, text=f"{_packed(slot)} looked up at load + MatMul", why=f"{reason}; ONNX Runtime makes it a dense weight at load")

    def rows(self, slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value:
        """`table[code] * scale` in float32, then in the site's dtype."""
        import onnx_ir as ir

        write = slot.writer
        values = cast(write, _entries(slot, ids), ir.DataType.FLOAT)
        scale = _scale(slot)
        if scale is not None:
            picked = scale if ids is None else write.op("Gather", scale, ids, axis=0)
            values = write.op("Mul", values, cast(write, picked, ir.DataType.FLOAT))
        return cast(write, values, ir.DataType.FLOAT16) if slot.site.dtype is torch.float16 else values


def _why_not_fused(site: WeightSite) -> str | None:
    """Reason why ONNX Runtime would not fuse the site to MatMulNBits, or None."""
    fmt = _format(site)
    if fmt.table is not TableType.INT8:
        return f"the {fmt.table.value} entries are on no 8-bit grid, which MatMulNBits needs"
    if site.dtype is torch.float16 and fmt.scale_dtype is ScaleType.FLOAT32:
        return "float32 scales in a float16 model"
    return None


def _block_weight(slot: Slot) -> onnx_ir.Value:
    """The dequantized weight `[K, N]`: 8-bit integers with the rows' scales, repeated in blocks of 128 along K."""
    import onnx_ir as ir

    site, write, scale = slot.site, slot.writer, _scale(slot)
    assert scale is not None
    codes = write.op("Transpose", _entries(slot, None), perm=[1, 0])
    scale = cast(write, scale, ir.DataType.FLOAT16 if site.dtype is torch.float16 else ir.DataType.FLOAT)
    if site.columns < BLOCK:
        return write.op("DequantizeLinear", codes, write.op("Reshape", scale, write.numbers(-1)), axis=1)
    blocks = write.op("Expand", write.op("Reshape", scale, write.numbers(1, -1)), write.numbers(-(-site.columns // BLOCK), site.rows))
    return write.op("DequantizeLinear", codes, blocks, axis=0, block_size=BLOCK)


def _entries(slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value:
    """The table's entry for every code, in the table's type: `[N, K]`, or `[..., K]` at `ids`."""
    write, fmt, payload = slot.writer, _format(slot.site), slot.site.payload()
    table = write.tensor(slot.site.tensors[1], payload["table"], (storage_key(payload["table"]), "table"))
    codes = read_codes(write, _stored(slot), slot.site.columns, ids)
    return write.op("GatherElements", _tables(slot, table, fmt.rows_per_table or slot.site.rows, ids), codes, axis=-1)


def _tables(slot: Slot, table: onnx_ir.Value, rows_per_table: int, ids: onnx_ir.Value | None) -> onnx_ir.Value:
    """`table: [T, E]` for every row, `[N, E]`, or for the rows at `ids`, `[..., E]`."""
    write, rows = slot.writer, slot.site.rows
    if ids is not None:
        if rows_per_table > 1:
            ids = write.op("Div", ids, write.op("CastLike", write.numbers(rows_per_table), ids))
        return write.op("Gather", table, ids, axis=0)
    if rows_per_table == 1:
        return table
    count, entries = _format(slot.site).tables(rows), _format(slot.site).entries
    repeated = write.op("Expand", write.op("Unsqueeze", table, write.numbers(1)), write.numbers(count, rows_per_table, entries))
    flat = write.op("Reshape", repeated, write.numbers(-1, entries))
    return flat if count * rows_per_table == rows else write.op("Slice", flat, write.numbers(0), write.numbers(rows), write.numbers(0))


def _stored(slot: Slot) -> StoredCodes:
    """The codes as the file holds them."""
    fmt, site, payload = _format(slot.site), slot.site, slot.site.payload()
    codes, _ = fmt.unpack(payload, site.rows, site.columns)
    return store_codes(slot.writer, site.tensors[0], codes, fmt.bits, (storage_key(payload["codes"]), "lut", fmt))


def _scale(slot: Slot) -> onnx_ir.Value | None:
    """The rows' scales `[N, 1]` as stored, if the format has them."""
    payload = slot.site.payload()
    return slot.writer.tensor(slot.site.tensors[2], payload["scale"], (storage_key(payload["scale"]), "scale")) if "scale" in payload else None


def _packed(slot: Slot) -> str:
    fmt = _format(slot.site)
    return f"{fmt.bits}-bit codes{' in ' + ' + '.join(map(str, bit_fields(fmt.bits))) if len(bit_fields(fmt.bits)) > 1 else ''}, {fmt.table.value} tables"


def _format(site: WeightSite) -> Lut:
    assert isinstance(site.format, Lut)
    return site.format
