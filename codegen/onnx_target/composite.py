"""Sums of formats in ONNX: every part by its own path, their outputs (linears) or weights (convolutions, embeddings) added.

The usual sum is a few bits for all weights and the outliers apart: MatMulNBits and, for these, gathered products (see `sparse_outliers.py`, which has the
measurements). Adding the outliers into one dense weight at load instead measured slower for one row of data and as fast for 32, in four times the memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

import torch

from ...ir.formats.base import WeightFormat
from ...ir.formats.composite import Composite
from ...ir.formats.sparse_outliers import SparseOutliers
from ...ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..target import No, Support, Yes, fast_path
from .layers import add_bias, cast, convolution
from .path import LOWEST_OPSET, Form, OnnxPath, Slot
from .sparse_outliers import TEXT, add_products

if TYPE_CHECKING:
    import onnx_ir


class CompositePath(OnnxPath):
    """Sums whose parts all have a path that takes the site."""

    def supports(self, site: WeightSite) -> Support:
        """What every part's path says."""
        for part in part_sites(site):
            path = _path(part.format)
            if path is None or (site.kind is not SiteKind.LINEAR and type(path).rows is OnnxPath.rows):
                return No(f"part {part.format.name}: no form for a part of a {site.kind.value} weight")
            if isinstance(answer := path.supports(part), No):
                return No(f"part {part.format.name}: {answer.reason}")
        return Yes()

    def opset(self, site: WeightSite) -> int:
        """What the most demanding part needs."""
        return max(LOWEST_OPSET, *(path.opset(part) for part in part_sites(site) if (path := _path(part.format))))

    def emit(self, slot: Slot) -> Form:
        """Add what the parts give."""
        if slot.site.kind is SiteKind.EMBEDDING:
            return Form(output=self.rows(slot, slot.x), text=f"Gather + sum of {_names(slot)}", why="touches only the gathered rows")
        if slot.site.kind in CONVOLUTIONS:
            output = convolution(slot, self.rows(slot, None))
            return Form(output=output, text=f"sum of {_names(slot)} at load + Conv", why="ONNX Runtime adds the parts to a dense weight at load")
        return _linear(slot)

    def rows(self, slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value:
        """The sum of the parts' rows in float32, then in the site's dtype."""
        import onnx_ir as ir

        write, parts = slot.writer, []
        for part in _part_slots(slot):
            path = _path(part.site.format)
            rows = path.rows(replace(part, site=replace(part.site, dtype=torch.float32)), ids) if path else None
            assert rows is not None, "supports() asks for it"
            parts.append(rows)
        total = reduce(lambda a, b: write.op("Add", a, b), parts)
        return cast(write, total, ir.DataType.FLOAT16) if slot.site.dtype is torch.float16 else total


def _linear(slot: Slot) -> Form:
    """The sum of the parts' products with `x: [..., K]`, the sparse ones added last."""
    output, forms, texts = None, [], []
    for part in sorted(_part_slots(slot), key=lambda p: isinstance(p.site.format, SparseOutliers)):
        path = _path(part.site.format)
        assert path is not None
        if isinstance(part.site.format, SparseOutliers):
            output = add_products(part, output)
            texts.append(TEXT)
            continue
        forms.append(path.emit(part))
        output = forms[-1].output if output is None else slot.writer.op("Add", output, forms[-1].output)
        texts.append(forms[-1].text)
    assert output is not None
    why = "; ".join(f.why for f in forms) or "touches only the kept weights"
    return Form(output=add_bias(slot, output), text=" plus ".join(texts), why=why, fused=any(f.fused for f in forms))


def part_sites(site: WeightSite) -> list[WeightSite]:
    """The site once for every part, as if it held that part alone."""
    fmt = site.format
    assert isinstance(fmt, Composite)
    sites, used = [], 0
    for part in fmt.formats:
        count = len(part.payload_spec(site.rows, site.columns, site.dtype))
        sites.append(replace(site, format=part, tensors=site.tensors[used : used + count]))
        used += count
    return sites


def _part_slots(slot: Slot) -> list[Slot]:
    """A slot for every part, without the bias and without the readers of the sum."""
    tied = [part_sites(t) for t in slot.tied if t.format == slot.site.format]
    return [replace(slot, site=part, bias=None, consumers=(), tied=tuple(t[i] for t in tied)) for i, part in enumerate(part_sites(slot.site))]


def _path(fmt: WeightFormat) -> OnnxPath | None:
    return fast_path(__package__, fmt.name, OnnxPath)  # type: ignore[type-abstract]


def _names(slot: Slot) -> str:
    return " + ".join(part.format.name for part in part_sites(slot.site))
