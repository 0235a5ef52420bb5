"""The fused form of affine linears: `DequantizeLinear` on `[K, N]` low-bit integers, blocks along K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ir.formats.affine import Affine, Granularity, ScaleType
from ...ir.sites import SiteKind, WeightSite
from ...ir.weights import storage_key
from .path import Slot
from .rows import row_tables
from .shared_data import CONTRIB

if TYPE_CHECKING:
    import onnx_ir

TWO_BIT_OPSET = 25
SMALLEST_BLOCK = 16
# Container bits -> smallest and largest block for which ONNX Runtime 1.32 has a fast kernel. Measured, 2048 x 2048, one row, 2 threads: dense 1.0 ms,
# 4 and 8 bits 0.1 to 0.5 ms, 2 bits 0.1 to 0.3 ms in blocks of 32 to 128 but 70 to 270 ms in blocks of 16 and 256.
FAST_BLOCKS = {2: (32, 128), 4: (16, 256), 8: (16, 256)}


@dataclass(frozen=True)
class Blocks:
    """Geometry of the fused form: container bits, signedness, rows N with padding, block size (None: one scale a row), repeats of each scale."""

    bits: int
    signed: bool
    rows: int
    size: int | None
    repeat: int
    count: int

    def __str__(self) -> str:
        kind = f"{'' if self.signed else 'u'}int{self.bits}"
        return f"DequantizeLinear[{kind}, {f'block {self.size}' if self.size else 'one scale a row'}]"


def why_not_fused(site: WeightSite) -> str | None:
    """Reason why ONNX Runtime would not fuse the site to MatMulNBits, or None."""
    fmt = site.format
    assert isinstance(fmt, Affine)
    if site.dtype is torch.float16 and fmt.scale_dtype is ScaleType.FLOAT32:
        return "float32 scales in a float16 model"
    width = fmt.group_width(site.columns)
    if fmt.grid(site.rows, site.columns)[1] > 1 and width & -width < SMALLEST_BLOCK:
        return f"group_size={width} has no power-of-two divisor of at least {SMALLEST_BLOCK}, which MatMulNBits needs"
    return None


def fused_blocks(site: WeightSite, opset: int) -> Blocks:
    """Geometry for a site that can be fused.

    2-bit integers need opset 25 and blocks of at least 32, else 4 bits hold them. ONNX Runtime 1.32 computes wrong results for fused 2-bit
    weights when N is not a multiple of 4 (measured), so such weights get up to 3 padding columns.
    """
    fmt = site.format
    assert isinstance(fmt, Affine)
    width, groups = fmt.group_width(site.columns), fmt.grid(site.rows, site.columns)[1]
    power = width & -width
    two_bit = opset >= TWO_BIT_OPSET and (groups == 1 or power >= FAST_BLOCKS[2][0])
    bits = next(b for b in (2, 4, 8) if b >= fmt.bits and (b > 2 or two_bit))
    rows = site.rows + (-site.rows % 4 if bits == 2 else 0)
    if groups == 1:
        return Blocks(bits, fmt.symmetric, rows, None, 1, 1)
    size = min(power, FAST_BLOCKS[bits][1])
    return Blocks(bits, fmt.symmetric, rows, size, width // size, -(-site.columns // size))


def block_weight(slot: Slot) -> tuple[onnx_ir.Value, str, str]:
    """The dequantized weight `[K, N]` of a fusable site, the operators' names, and the reason for the form."""
    site, blocks = slot.site, fused_blocks(slot.site, slot.writer.opset)
    if blocks.bits == 8 and site.tied and _scale_a_block(site, blocks):
        return _shared_weight(slot, blocks)
    if shares_nibbles(slot):
        codes, scale, zero = (_turned(slot, v) for v in _nibbles(slot))
        return _dequantize(slot, codes, scale, zero, blocks), f"Transpose + {blocks}", _stored_once(slot)
    return _own_weight(slot, blocks), str(blocks), _why(_format(site), blocks, site)


def _own_weight(slot: Slot, blocks: Blocks) -> onnx_ir.Value:
    """Codes stored as `[K, N]`, as ONNX Runtime's pattern has them."""
    site = slot.site
    codes, scale, zero = _unpacked(site, blocks)
    key = (storage_key(site.payload()["codes"]), "blocks", blocks)
    name = site.tensors[0].removesuffix("_codes")
    stored = slot.writer.integers(f"{name}_codes", _pad(codes, blocks.rows).t(), blocks.bits, blocks.signed, key)
    zeros = None
    if zero is not None:
        spread = _pad(zero.expand(site.rows, -1), blocks.rows).t().repeat_interleave(blocks.repeat, 0)[: blocks.count]
        zeros = slot.writer.integers(f"{name}_zero_point", spread if blocks.size else spread[0], blocks.bits, False, (*key, "zero"))
    scales = _scales(slot, scale, blocks, (*key, "scale"))
    return _dequantize(slot, stored, scales, zeros, blocks)


def shares_nibbles(slot: Slot) -> bool:
    """Whether 4-bit codes are stored once for a linear and the embedding that is tied to it, whose rows ONNX Runtime's own operator gathers."""
    site, kinds = slot.site, {s.kind for s in (slot.site, *slot.tied)}
    if not slot.writer.contrib or kinds != {SiteKind.LINEAR, SiteKind.EMBEDDING} or len(slot.tied) != 1 or why_not_fused(site) is not None:
        return False
    blocks = fused_blocks(site, slot.writer.opset)
    return blocks.bits == 4 and blocks.size is not None and _scale_a_block(site, blocks)


def _scale_a_block(site: WeightSite, blocks: Blocks) -> bool:
    """Whether stored scales serve as they are, none repeated or spread."""
    return blocks.repeat == 1 and _format(site).sharing is not Granularity.TENSOR


def gathered_rows(slot: Slot) -> tuple[onnx_ir.Value, str, str]:
    """Rows `[..., K]` at the site's ids, of codes that a linear shares; the operator, and the reason for the form."""
    codes, scale, zero = _nibbles(slot)
    blocks = fused_blocks(slot.site, slot.writer.opset)
    options = {"gather_axis": 0, "quantize_axis": 1, "block_size": blocks.size, "bits": 4}
    rows = slot.writer.op("GatherBlockQuantized", codes, slot.x, scale, zero, domain=CONTRIB, **options)
    return rows, f"GatherBlockQuantized[{'' if blocks.signed else 'u'}int4, block {blocks.size}]", _stored_once(slot)


def _nibbles(slot: Slot) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value | None]:
    """4-bit codes `[N, K]`, scales `[N, G]` in the model's dtype and zero points `[N, G]`, stored once for all sites that share them."""
    site, write = slot.site, slot.writer
    blocks = fused_blocks(site, write.opset)
    codes, scale, zero = _unpacked(site, blocks)
    key = (storage_key(site.payload()["codes"]), "nibbles", blocks)
    stored = write.integers(site.tensors[0], codes, 4, blocks.signed, key)
    zeros = None if zero is None else write.integers(site.tensors[2], zero, 4, False, (*key, "zero"))
    return stored, _cast_scale(slot, write.tensor(site.tensors[1], scale, (*key, "scale"))), zeros


def _turned(slot: Slot, rows: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """`[N, .] -> [., N]`; folded at load."""
    return None if rows is None else slot.writer.op("Transpose", rows, perm=[1, 0])


def _stored_once(slot: Slot) -> str:
    return f"shares its {fused_blocks(slot.site, slot.writer.opset).bits}-bit codes with {', '.join(slot.site.tied)}, stored once"


def _dequantize(slot: Slot, codes: onnx_ir.Value | None, scale: onnx_ir.Value | None, zero: onnx_ir.Value | None, blocks: Blocks) -> onnx_ir.Value:
    return slot.writer.op("DequantizeLinear", codes, scale, zero, axis=0 if blocks.size else 1, block_size=blocks.size)


def _scales(slot: Slot, scale: Tensor, blocks: Blocks, key: tuple[object, ...]) -> onnx_ir.Value:
    """Scales `[G, N]` (or `[N]`) in the model's dtype; they are stored once a group in their own dtype and repeated in the graph."""
    write, name = slot.writer, slot.site.tensors[1]
    if _format(slot.site).sharing is Granularity.TENSOR:
        single = _cast_scale(slot, write.tensor(name, scale.reshape(1), key))
        return write.op("Expand", single, write.numbers(blocks.rows))
    padded = _pad(scale, blocks.rows, fill=1.0).t()
    if blocks.size is None:
        return _cast_scale(slot, write.tensor(name, padded[0], key))
    stored = _cast_scale(slot, write.tensor(name, padded.unsqueeze(1) if blocks.repeat > 1 else padded, key))
    if blocks.repeat == 1:
        return stored
    spread = write.op("Expand", stored, write.numbers(1, blocks.repeat, 1))
    flat = write.op("Reshape", spread, write.numbers(-1, blocks.rows))
    if scale.shape[1] * blocks.repeat == blocks.count:
        return flat
    return write.op("Slice", flat, write.numbers(0), write.numbers(blocks.count), write.numbers(0))


def _cast_scale(slot: Slot, scale: onnx_ir.Value) -> onnx_ir.Value:
    """Scales in float32 (a float16 model keeps float16); symmetric 1-bit codes are stored as -1 and +1, so their scale is halved."""
    import onnx_ir as ir

    write = slot.writer
    dtype = ir.DataType.FLOAT16 if slot.site.dtype is torch.float16 else ir.DataType.FLOAT
    cast = scale if scale.dtype == dtype else write.op("Cast", scale, to=dtype.value)
    fmt = _format(slot.site)
    return write.op("Mul", cast, write.constant(torch.tensor(0.5, dtype=slot.site.dtype))) if fmt.symmetric and fmt.bits == 1 else cast


def _shared_weight(slot: Slot, blocks: Blocks) -> tuple[onnx_ir.Value, str, str]:
    """8-bit codes shared with an embedding: stored once as `[N, K]` rows; the Transposes are folded at load."""
    write, site = slot.writer, slot.site
    codes, scale, zero = row_tables(slot)
    shape = (blocks.count, site.rows) if blocks.size else (site.rows,)

    def turned(rows: onnx_ir.Value) -> onnx_ir.Value:
        """`[N, G] -> [G, N]`, or `[N]` when there is one group."""
        return write.op("Transpose", rows, perm=[1, 0]) if blocks.size else write.op("Reshape", rows, write.numbers(-1))

    middle = write.constant(torch.tensor(_format(site).levels // 2, dtype=torch.uint8))
    zeros = turned(zero) if zero is not None else write.op("Expand", middle, write.numbers(*shape))
    weight = _dequantize(slot, write.op("Transpose", codes, perm=[1, 0]), _cast_scale(slot, turned(scale)), zeros, blocks)
    return weight, f"Transpose + {str(blocks).replace('[int', '[uint')}", _stored_once(slot)


def _unpacked(site: WeightSite, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes `[N, K] uint8` as the container holds them (signed ones modulo `2^bits`), scales and zero points `[N, G]` or `[1, 1]`."""
    fmt, payload = _format(site), site.payload()
    codes, _, zero = fmt.unpack(payload, site.rows, site.columns)
    if not fmt.symmetric:
        return codes, payload["scale"], zero.to(torch.uint8)
    signed = codes * 2 - 1 if fmt.bits == 1 else codes - int(fmt.fixed_zero)  # uint8 wraps around
    return signed & (2**blocks.bits - 1), payload["scale"], None


def _pad(rows: Tensor, count: int, fill: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, count - rows.shape[0]), value=fill) if count > rows.shape[0] else rows


def _format(site: WeightSite) -> Affine:
    assert isinstance(site.format, Affine)
    return site.format


def _why(fmt: Affine, blocks: Blocks, site: WeightSite) -> str:
    notes = ["symmetric: signed codes without zero points" if fmt.symmetric else "zero points stored in the codes' type"]
    if blocks.bits != fmt.bits:
        notes.append(f"{fmt.bits}-bit codes in a {blocks.bits}-bit container")
    if blocks.repeat > 1:
        notes.append(f"groups of {fmt.group_size} split into blocks of {blocks.size}, scales repeated at load")
    if blocks.rows > site.rows:
        notes.append(f"{blocks.rows - site.rows} padding columns, because ONNX Runtime's 2-bit kernel needs N to be a multiple of 4")
    return "; ".join(notes)
