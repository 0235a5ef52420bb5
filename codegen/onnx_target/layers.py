"""What the fast paths share: the operators around a weight, whatever form the weight has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...ir.sites import SiteKind
from .path import Slot

if TYPE_CHECKING:
    import onnx_ir

    from .writer import Writer

# ONNX Runtime 1.32 leaves a MatMul before these alone, or makes it a FusedGemm (measured); a Squeeze in between lets it become MatMulNBits.
TAKES_LINEAR = frozenset({"Relu", "Clip"})


def linear(slot: Slot, weight: onnx_ir.Value, *, fused: bool = False, padded: bool = False) -> onnx_ir.Value:
    """`x: [..., K] @ weight: [K, N] + bias -> [..., N]`.

    `fused`: written such that ONNX Runtime can fuse weight and product. `padded`: the weight has further columns, which are dropped.
    """
    write = slot.writer
    lifted = fused and any(n.op_type in TAKES_LINEAR for n in slot.consumers)
    x = write.op("Unsqueeze", slot.x, write.numbers(0)) if lifted else slot.x
    output = write.op("MatMul", x, weight)
    if fused:
        write.products[output.producer()] = slot.site.name
    if padded:
        output = write.op("Slice", output, write.numbers(0), write.numbers(slot.site.rows), write.numbers(-1))
    output = add_bias(slot, output)
    return write.op("Squeeze", output, write.numbers(0)) if lifted else output


def add_bias(slot: Slot, output: onnx_ir.Value) -> onnx_ir.Value:
    """`output: [..., N]` plus the site's bias, if it has one."""
    return slot.writer.op("Add", output, slot.bias) if slot.bias is not None else output


def why_shared(slot: Slot) -> str | None:
    """Reason why a weight that several linears share is not fused, or None."""
    if any(t.kind is SiteKind.LINEAR for t in slot.tied):
        return f"{len(slot.tied) + 1} sites share the weight, and ONNX Runtime fuses a weight with one reader only"
    return None


def convolution(slot: Slot, rows: onnx_ir.Value) -> onnx_ir.Value:
    """1-d or 2-d convolution of `x: [B, I, *space]`, or of unbatched `[I, *space]`, with the weight as `rows: [O, I/groups * kernel]`."""
    site, write = slot.site, slot.writer
    weight = write.op("Reshape", rows, write.numbers(*site.shape))
    padding = list(slot.option("padding"))
    geometry: dict[str, Any] = {"strides": list(slot.option("stride")), "pads": padding * 2, "dilations": list(slot.option("dilation")), "group": site.groups}
    unbatched = slot.x.shape is not None and len(slot.x.shape) == len(site.shape) - 1
    x = write.op("Unsqueeze", slot.x, write.numbers(0)) if unbatched else slot.x
    output = write.op("Conv", x, weight, slot.bias, **geometry)
    return write.op("Squeeze", output, write.numbers(0)) if unbatched else output


def cast(write: Writer, value: onnx_ir.Value, kind: onnx_ir.DataType) -> onnx_ir.Value:
    """`value` in the element type `kind`."""
    return value if value.dtype == kind else write.op("Cast", value, to=kind.value)
