"""Kept weights in ONNX files: exact for any pattern, stored once, summed without two updates of one place."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxpress.codegen.onnx_target import export_onnx
from fxpress.codegen.onnx_target.sparse_outliers import runs_of
from fxpress.ir.formats.sparse_outliers import SparseOutliers, ValueType

from ...tiny import seeded
from .sides import compressed, errors

SPECS = tuple(f"sparse_outliers{{count={count},tile_rows=4,tile_columns=32,values={kind}}}" for count in (0, 1, 30, 700) for kind in ("float16", "float32"))


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 2**31))
def test_runs_hold_every_entry_once_and_every_row_at_most_once(rows: int, count: int, seed: int) -> None:
    row = torch.randint(rows, (count,), generator=seeded(seed))
    seen = []
    for entries in runs_of(row, rows):
        assert len(entries) & (len(entries) - 1) == 0
        assert bool((row[entries] == row[entries[0]]).all())
        assert len(set(row[entries[0]].tolist())) == entries.shape[1]
        seen += entries.flatten().tolist()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("shape", [(3, 72), (72,), (2, 3, 72)])
def test_linears(tmp_path: Path, shape: tuple[int, ...]) -> None:
    _, found = errors(lambda: nn.Linear(72, 10), torch.randn(shape), SPECS, tmp_path)
    assert not {spec: both for spec, both in found.items() if max(both) > 1e-6}


def test_convolutions(tmp_path: Path) -> None:
    _, found = errors(lambda: nn.Conv2d(8, 12, (3, 3), stride=2, padding=1), torch.randn(2, 8, 9, 9), SPECS, tmp_path)
    assert not {spec: both for spec, both in found.items() if max(both) > 1e-6}


def test_all_in_one_row(tmp_path: Path) -> None:
    program = compressed(nn.Linear(50, 6, bias=False), torch.randn(3, 50), ["dense"])
    fmt, mask = SparseOutliers(count=50, values=ValueType.FLOAT32), torch.zeros(6, 50, dtype=torch.bool)
    mask[4] = True
    matrix = program.sites()[0].matrix()
    program = compressed(linear_of(matrix * mask), torch.randn(3, 50), [fmt])
    assert export_onnx(program, tmp_path / "model.onnx").max_error < 5e-6


def linear_of(matrix: torch.Tensor) -> nn.Module:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data = matrix
    return layer


def test_files_hold_places_and_values(tmp_path: Path) -> None:
    program = compressed(nn.Linear(1024, 256, bias=False), torch.randn(3, 1024), ["sparse_outliers{count=5000}"])
    report = export_onnx(program, tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert sum(len(t.raw_data) for t in model.graph.initializer) == report.lowering.nbytes == report.lowering.sites[0].nbytes
    assert 5000 * 4 + 256 * 2 < report.lowering.nbytes < 5000 * 4 + 256 * 2 * 5
    assert report.file_bytes < report.lowering.nbytes + 8192


def test_dynamic_batches_and_float16(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", max=64)
    program = compressed(nn.Linear(64, 16).half(), torch.randn(3, 64).half(), ["sparse_outliers{count=99}"], dynamic_shapes=({0: batch},))
    report = export_onnx(program, tmp_path / "model.onnx")
    assert len({tuple(c.sizes.values()) for c in report.checks}) == 2
    assert report.max_error < 5e-3


def test_embeddings_are_decoded(tmp_path: Path) -> None:
    report = export_onnx(compressed(nn.Embedding(20, 16), torch.randint(20, (2, 3)), ["sparse_outliers{count=50}"]), tmp_path / "model.onnx")
    assert "single rows cannot be looked up" in report.lowering.sites[0].why
