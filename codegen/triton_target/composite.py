"""Sums of parts for the Triton kernels: outliers kept apart, in slots, over one part that has kernels of its own (SqueezeLLM's dense and sparse split)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...ir.formats.composite import Composite
from ...ir.formats.sparse_outliers import SparseOutliers
from ..target import No, Support, fast_path
from .layout import Structure
from .pack import Source
from .path import Stored, TritonPath
from .slots import Outliers


class CompositePath(TritonPath):
    """`sparse_outliers` and one other part, in any order. Its sums are float32, the format's own too; the decoded weight is rounded once more at outliers."""

    def supports(self, stored: Stored) -> Support:
        """What the other part's path says, and whether the outliers are exact in two slots each."""
        parts = _parts(stored)
        outliers = [p for p in parts if isinstance(p.format, SparseOutliers)]
        others = [p for p in parts if not isinstance(p.format, SparseOutliers)]
        if len(outliers) != 1 or len(others) != 1:
            return No(f"a sum of {len(outliers)} sparse_outliers and {len(others)} other parts; the kernels take one of each")
        values = outliers[0].payload["values"]
        high, low = _addends(values, stored.dtype)
        if not torch.equal(high.float() + low.float(), values.float()):
            return No(f"{values.dtype} outliers are not exact as two {stored.dtype}; store them as float16")
        path = _path(others[0])
        return path.supports(others[0]) if path is not None else No(f"there is no fast path codegen/triton_target/{others[0].format.name}.py")

    def source(self, stored: Stored) -> tuple[Source, Structure]:
        """The other part's source, with the outliers along."""
        first, second = _parts(stored)
        apart, other = (first, second) if isinstance(first.format, SparseOutliers) else (second, first)
        path = _path(other)
        assert path is not None and isinstance(apart.format, SparseOutliers)
        source, structure = path.source(other)
        row, column = apart.format.indices(apart.payload, stored.rows, stored.columns)
        addends = _addends(apart.payload["values"], stored.dtype)
        used = torch.stack([a != 0 for a in addends])
        outliers = Outliers(row=row.expand_as(used)[used], column=column.expand_as(used)[used], value=torch.stack(addends)[used])
        return replace(source, outliers=outliers), structure


def _addends(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two `dtype` tensors whose sum the values are, as far as two can: bfloat16 holds 8 bits, and float16 11."""
    high = values.to(dtype)
    return high, (values.float() - high.float()).to(dtype)


def _parts(stored: Stored) -> list[Stored]:
    assert isinstance(stored.format, Composite)
    split = stored.format.split(stored.payload, stored.rows, stored.columns, stored.dtype)
    return [replace(stored, format=fmt, payload=payload) for fmt, payload in split]


def _path(stored: Stored) -> TritonPath | None:
    return fast_path(__package__, stored.format.name, TritonPath)  # type: ignore[type-abstract]
