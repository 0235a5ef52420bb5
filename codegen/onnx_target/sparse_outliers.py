"""Few weights kept apart in ONNX: gather their inputs, multiply, sum by row, add to the output.

A row's weights are cut in runs whose lengths are the powers of two in their number, so that all runs of one length are one `Gather`, `Mul`, `ReduceSum` without
padding, and no `ScatterND` adds twice to a row: ONNX Runtime 1.32 adds from several threads without a lock, and loses some of such sums (measured).
Measured with 0.45 % of the weights, chosen at random, of 40 pairs of linears 576 -> 1536 -> 576 (8-bit MatMulNBits, weights beyond the caches, 2 threads),
median ms a pair for 1 / 32 / 128 rows of data: without outliers 0.21 / 1.4 / 4.5; these runs 0.56 / 2.6 / 8.9; `ScatterElements` 0.54 / 7.8 / 22.5;
one racy `ScatterND` 0.43 / 2.2 / 6.8; a product with the columns that hold outliers (most do) 1.0 / 4.7 / 16; dense float32 with them 0.78 / 2.5 / 8.0.
Slots, as many for every row as the fullest has, with 576 x 576 and cached weights in us for 1 / 32 rows: 105 / 1476, against 33 / 190 of one `ScatterND`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ir.formats.sparse_outliers import SparseOutliers
from ...ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ...ir.weights import storage_key
from ..target import No, Support, Yes
from .layers import add_bias, cast, convolution
from .path import Form, OnnxPath, Slot

if TYPE_CHECKING:
    import onnx_ir


class SparseOutliersPath(OnnxPath):
    """`positions` and `values` of the kept weights, by rows; see the module's docstring."""

    def supports(self, site: WeightSite) -> Support:
        """Linears and convolutions in float32 or float16."""
        if site.kind is SiteKind.EMBEDDING:
            return No("kept weights are stored in runs, from which single rows cannot be looked up")
        if site.dtype not in (torch.float32, torch.float16):
            return No(f"the weight decodes to {site.dtype}, and the sums are float32 or float16 only")
        return Yes()

    def emit(self, slot: Slot) -> Form:
        """All other weights are 0."""
        if slot.site.kind in CONVOLUTIONS:
            output = convolution(slot, self.rows(slot, None))
            return Form(output=output, text="kept weights placed at load + Conv", why="ONNX Runtime has no sparse convolution")
        return Form(output=add_bias(slot, add_products(slot, None)), text=TEXT, why="touches only the kept weights")

    def rows(self, slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value:
        """Zeros with the kept weights in their places, `[N, K]`."""
        import onnx_ir as ir

        assert ids is None, "supports() refuses embeddings"
        write, site = slot.writer, slot.site
        weight = write.op("Expand", write.constant(torch.zeros(())), write.numbers(site.rows * site.columns))
        for run in stored_runs(slot):
            starts = write.op("Mul", cast(write, run.rows, ir.DataType.INT64), write.numbers(site.columns))
            places = write.op("Add", cast(write, run.columns, ir.DataType.INT64), starts)
            values = write.op("Squeeze", cast(write, run.values, ir.DataType.FLOAT), write.numbers(-1))
            weight = write.op("ScatterND", weight, write.op("Unsqueeze", places, write.numbers(-1)), values)
        weight = write.op("Reshape", weight, write.numbers(site.rows, site.columns))
        return cast(write, weight, ir.DataType.FLOAT16) if site.dtype is torch.float16 else weight


TEXT = "Gather + Mul + ReduceSum + ScatterND on kept weights"


@dataclass(frozen=True)
class Run:
    """The runs of one length L: `columns: [L, R]` and `values: [L, R, 1]` of their weights, `rows: [R]` that each belongs to."""

    columns: onnx_ir.Value
    values: onnx_ir.Value
    rows: onnx_ir.Value
    length: int


def add_products(slot: Slot, output: onnx_ir.Value | None) -> onnx_ir.Value:
    """`output: [..., N]` (None: zeros) plus the kept weights times `x: [..., K]`, summed in float32; without the bias."""
    import onnx_ir as ir

    write, site, half = slot.writer, slot.site, slot.site.dtype is torch.float16
    flat = slot.x.shape is not None and len(slot.x.shape) == 2
    x = slot.x if flat else write.op("Reshape", slot.x, write.numbers(-1, site.columns))
    data = write.op("Transpose", write.op("Cast", x, to=ir.DataType.FLOAT.value) if half else x, perm=[1, 0])
    if output is None:
        shape = write.op("Concat", write.numbers(site.rows), write.op("Shape", data, start=1), axis=0)
        total = write.op("Expand", write.constant(torch.zeros(())), shape)
    else:
        matrix = output if flat else write.op("Reshape", output, write.numbers(-1, site.rows))
        total = write.op("Transpose", write.op("Cast", matrix, to=ir.DataType.FLOAT.value) if half else matrix, perm=[1, 0])
    for run in stored_runs(slot):
        total = _add_run(slot, total, data, run)
    total = write.op("Transpose", total, perm=[1, 0])
    total = write.op("Cast", total, to=ir.DataType.FLOAT16.value) if half else total
    return total if flat else write.op("Reshape", total, _output_shape(slot))


def _add_run(slot: Slot, total: onnx_ir.Value, data: onnx_ir.Value, run: Run) -> onnx_ir.Value:
    """`total: [N, M]` plus the products of one length's runs with `data: [K, M]`."""
    import onnx_ir as ir

    write = slot.writer
    inputs = write.op("Gather", data, cast(write, run.columns, ir.DataType.INT32), axis=0)
    products = write.op("Mul", inputs, cast(write, run.values, ir.DataType.FLOAT))
    sums = write.op("ReduceSum", products, write.numbers(0), keepdims=0) if run.length > 1 else write.op("Squeeze", products, write.numbers(0))
    places = write.op("Unsqueeze", cast(write, run.rows, ir.DataType.INT64), write.numbers(-1))
    return write.op("ScatterND", total, places, sums, reduction="add")


def _output_shape(slot: Slot) -> onnx_ir.Value:
    """Shape `[..., N]` of the output as `x: [..., K]` has it."""
    return slot.writer.op("Concat", slot.writer.op("Shape", slot.x, end=-1), slot.writer.numbers(slot.site.rows), axis=0)


def stored_runs(slot: Slot) -> list[Run]:
    """The kept weights as the file holds them: 2 bytes a column (4 beyond 65536 columns) and a value each, and 2 (4) bytes a run for its row."""
    site, write, payload = slot.site, slot.writer, slot.site.payload()
    fmt = site.format
    assert isinstance(fmt, SparseOutliers)
    key, (_, positions, values) = (storage_key(payload["values"]), "runs"), site.tensors
    row, column = fmt.indices(payload, site.rows, site.columns)
    runs = []
    for entries in runs_of(row, site.rows):
        length = len(entries)
        stored = (
            write.tensor(f"{positions}_{length}", _short(column[entries], site.columns), (*key, "columns", length)),
            write.tensor(f"{values}_{length}", payload["values"][entries].unsqueeze(-1), (*key, "values", length)),
            write.tensor(f"{positions}_rows_{length}", _short(row[entries[0]], site.rows), (*key, "rows", length)),
        )
        runs.append(Run(*stored, length))
    return runs


def runs_of(row: Tensor, rows: int) -> Iterator[Tensor]:
    """Entries `[L, R] int64` in runs of length L, for every power of two L in the numbers of entries of `row: [count] int64`; rows ascend in each."""
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=rows)
    starts = counts.cumsum(0) - counts
    for bit in range(int(counts.max()).bit_length() if rows else 0):
        length = 1 << bit
        with_run = (counts & length).nonzero().squeeze(1)
        if len(with_run):
            yield order[starts[with_run] + torch.arange(length).unsqueeze(1)]
            starts[with_run] += length


def _short(numbers: Tensor, limit: int) -> Tensor:
    """Numbers below `limit` in 16 bits where these hold them."""
    return numbers.to(torch.uint16 if limit <= 2**16 else torch.int32)
