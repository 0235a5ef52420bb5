"""Dense weights stored in a narrower float type: the stored values, a Cast (folded at load), and the plain operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...ir.sites import SiteKind, WeightSite
from ...ir.weights import storage_key
from ..target import No, Support, Yes
from .layers import linear
from .path import Form, OnnxPath, Slot

if TYPE_CHECKING:
    import onnx_ir

READABLE = (torch.float32, torch.float16, torch.bfloat16)
COMPUTED = (torch.float32, torch.float16)


class DensePath(OnnxPath):
    """`values: [N, K]` in float32, float16 or bfloat16 under a model of float32 or float16."""

    def supports(self, site: WeightSite) -> Support:
        """Linears and embeddings; convolutions are decoded."""
        if site.kind not in (SiteKind.LINEAR, SiteKind.EMBEDDING):
            return No(f"no narrow form for {site.kind.value} sites")
        stored = site.payload()["values"].dtype
        return Yes() if stored in READABLE and site.dtype in COMPUTED else No(f"{stored} values under a {site.dtype} model")

    def emit(self, slot: Slot) -> Form:
        """`Gather` then `Cast`, or `Cast`, `Transpose`, `MatMul`."""
        name = str(slot.site.payload()["values"].dtype).removeprefix("torch.")
        if slot.site.kind is SiteKind.EMBEDDING:
            return Form(output=self.rows(slot, slot.x), text=f"Gather[{name}] + Cast", why="casts only the gathered rows")
        output = linear(slot, slot.writer.op("Transpose", self.rows(slot, None), perm=[1, 0]))
        return Form(output=output, text=f"Cast[{name}] + MatMul", why="ONNX Runtime casts it at load")

    def rows(self, slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value:
        """The stored values, gathered and cast."""
        import onnx_ir as ir

        write, values = slot.writer, slot.site.payload()["values"]
        stored = write.tensor(slot.site.tensors[0], values, (storage_key(values), "dense"))
        kind = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}[slot.site.dtype].value
        return write.op("Cast", stored if ids is None else write.op("Gather", stored, ids, axis=0), to=kind)
