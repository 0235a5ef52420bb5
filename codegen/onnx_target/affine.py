"""Affine weights in ONNX: block-wise DequantizeLinear that ONNX Runtime fuses to MatMulNBits, or bit operations on packed rows.

Linear sites: `[K, N]` integers of 2, 4 or 8 bits + `DequantizeLinear` + `MatMul`. Embeddings: only the gathered rows are unpacked. Convolutions, and
groups that MatMulNBits cannot hold (no power-of-two divisor of at least 16), are written as packed rows + arithmetic, which ONNX Runtime folds
to a float32 weight when it loads the model (measured: convolutions then run at dense speed, up to 2x faster than with DequantizeLinear).
float16 scales stay float16 in the file; the Cast is folded at load and does not hinder the fusion (ONNX Runtime 1.32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...ir.formats.affine import Affine
from ...ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..target import No, Support, Yes
from .blocks import TWO_BIT_OPSET, block_weight, fused_blocks, gathered_rows, shares_nibbles, why_not_fused
from .layers import convolution, linear, why_shared
from .path import LOWEST_OPSET, Form, OnnxPath, Slot
from .rows import row_container, row_weight

if TYPE_CHECKING:
    import onnx_ir


class AffinePath(OnnxPath):
    """Affine codes of 1 to 8 bits; see the module's docstring."""

    def supports(self, site: WeightSite) -> Support:
        """Weights that decode to float32 or float16."""
        if site.dtype in (torch.float32, torch.float16):
            return Yes()
        return No(f"the weight decodes to {site.dtype}, and the integer forms give float32 or float16 only")

    def opset(self, site: WeightSite) -> int:
        """2-bit integers came with opset 25."""
        fused = site.kind is SiteKind.LINEAR and why_not_fused(site) is None
        return TWO_BIT_OPSET if fused and fused_blocks(site, TWO_BIT_OPSET).bits == 2 else LOWEST_OPSET

    def emit(self, slot: Slot) -> Form:
        """Write the form that suits the site's kind."""
        if slot.site.kind is SiteKind.EMBEDDING:
            return _embedding(slot)
        if slot.site.kind in CONVOLUTIONS:
            return _convolution(slot)
        return _linear(slot)

    def rows(self, slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value:
        """Packed rows, unpacked."""
        return row_weight(slot, ids)


def format_of(site: WeightSite) -> Affine:
    """The site's format, known to be affine."""
    assert isinstance(site.format, Affine)
    return site.format


def _linear(slot: Slot) -> Form:
    """`x: [..., K] -> [..., N]`."""
    reason = why_shared(slot) or why_not_fused(slot.site)
    if reason is None:
        weight, text, why = block_weight(slot)
        output = linear(slot, weight, fused=True, padded=fused_blocks(slot.site, slot.writer.opset).rows > slot.site.rows)
        return Form(output=output, text=f"{text} + MatMul (fused to MatMulNBits by ONNX Runtime)", why=why, fused=True)
    output = linear(slot, slot.writer.op("Transpose", row_weight(slot, None), perm=[1, 0]))
    return Form(output=output, text=f"{_packed(slot.site)} unpacked at load + MatMul", why=f"{reason}; ONNX Runtime unpacks it to a dense weight at load")


def _embedding(slot: Slot) -> Form:
    """Rows `[..., D]` at ids `[...]`; only the gathered rows are unpacked."""
    if shares_nibbles(slot):
        output, text, why = gathered_rows(slot)
        return Form(output=output, text=text, why=why)
    text = f"Gather[{_packed(slot.site)}] + unpack, Sub, Mul"
    return Form(output=row_weight(slot, slot.x), text=text, why=f"touches only the gathered rows{_container_note(slot.site)}")


def _convolution(slot: Slot) -> Form:
    """1-d or 2-d convolution of `x: [B, I, *space]`, or of unbatched `[I, *space]`."""
    why = f"ONNX Runtime unpacks it to a dense weight at load and convolves at dense speed{_container_note(slot.site)}"
    return Form(output=convolution(slot, row_weight(slot, None)), text=f"{_packed(slot.site)} unpacked at load + Conv", why=why)


def _packed(site: WeightSite) -> str:
    return f"uint8 rows of {row_container(format_of(site).bits)}-bit codes"


def _container_note(site: WeightSite) -> str:
    bits = format_of(site).bits
    return f"; {bits}-bit codes in a {row_container(bits)}-bit container" if row_container(bits) != bits else ""
