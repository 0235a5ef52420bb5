"""Kept weights: the right ones, at the right places, for what they cost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import FormatError, SpecError
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.sparse_outliers import SparseOutliers, ValueType
from fxpress.runtime.artifact import load, save

from ...checks import assert_same, compress
from ...tiny import randn, seeded


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, SparseOutliers]:
    """A matrix, a mask of kept weights, and a format that counts them."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    generator = seeded(draw(st.integers(0, 2**31)))
    matrix = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    tile = draw(st.sampled_from([(1, 1), (3, 4), (4, 3), (5, 64), (64, 64), (256, 256), (1, 65536)]))
    fmt = SparseOutliers(count=int(mask.sum()), tile_rows=tile[0], tile_columns=tile[1], values=draw(st.sampled_from(ValueType)))
    return matrix, mask, fmt


@given(cases())
def test_decoding_inverts_packing(case: tuple[Tensor, Tensor, SparseOutliers]) -> None:
    matrix, mask, fmt = case
    payload = fmt.pack(mask, matrix)
    expected = torch.where(mask, matrix.to(payload["values"].dtype).float(), 0.0)
    assert_same(fmt.decode(payload, len(matrix), matrix.shape[1], torch.float32), expected)
    row, column = fmt.indices(payload, *matrix.shape)
    assert row.dtype == column.dtype == torch.int64
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == {(r, c) for r, c in mask.nonzero().tolist()}


@given(cases())
def test_entries_run_tile_by_tile_in_ascending_places(case: tuple[Tensor, Tensor, SparseOutliers]) -> None:
    matrix, mask, fmt = case
    payload = fmt.pack(mask, matrix)
    starts, places = payload["tile_starts"].tolist(), payload["positions"].tolist()
    down, across = fmt.grid(*matrix.shape)
    assert (starts[0], starts[-1], len(starts)) == (0, fmt.count, down * across + 1)
    for tile, (start, end) in enumerate(itertools.pairwise(starts)):
        top, left = tile // across * fmt.tile_rows, tile % across * fmt.tile_columns
        inside = mask[top : top + fmt.tile_rows, left : left + fmt.tile_columns]
        assert places[start:end] == [r * fmt.tile_columns + c for r, c in inside.nonzero().tolist()]


@given(cases())
def test_bytes_are_those_of_the_payload(case: tuple[Tensor, Tensor, SparseOutliers]) -> None:
    matrix, mask, fmt = case
    payload = fmt.pack(mask, matrix)
    fmt.check_payload(payload, len(matrix), matrix.shape[1], torch.float32, "here")
    assert fmt.nbytes(len(matrix), matrix.shape[1], torch.float32) == sum(t.nbytes for t in payload.values())
    assert parse_format(fmt.to_spec()) == fmt


@given(st.integers(0, 2**31), st.integers(0, 60), st.booleans())
def test_encoding_keeps_the_largest(seed: int, count: int, coarse: bool) -> None:
    matrix = torch.randn(6, 10, generator=seeded(seed))
    matrix = matrix.round() if coarse else matrix
    got = SparseOutliers(count=count, tile_rows=4, tile_columns=4, values=ValueType.FLOAT32)
    kept, _ = zip(*sorted(enumerate(matrix.flatten().tolist()), key=lambda pair: -abs(pair[1])), strict=True)  # stable: equal ones in row-major order
    expected = torch.zeros(60).index_copy(0, torch.tensor(kept[:count], dtype=torch.int64), matrix.flatten()[list(kept[:count])])
    assert_same(got.decode(got.encode(matrix), 6, 10, torch.float32), expected.reshape(6, 10))
    assert len(got.encode(matrix)["values"]) == count


def test_the_last_place_of_a_large_tile() -> None:
    fmt = SparseOutliers(count=1, tile_rows=256, tile_columns=256, values=ValueType.FLOAT32)
    matrix = torch.zeros(256, 256)
    matrix[255, 255] = 2
    payload = fmt.encode(matrix)
    assert payload["positions"].tolist() == [65535]
    assert_same(fmt.decode(payload, 256, 256, torch.float32), matrix)


def test_values_beyond_half_precision_are_refused() -> None:
    matrix = torch.tensor([[1e6, 0.0, -1e6]])
    with pytest.raises(FormatError, match=r"float16 holds magnitudes up to 65504, got 1e\+06; store it as float32"):
        SparseOutliers(count=2).encode(matrix)
    assert SparseOutliers(count=2, values=ValueType.FLOAT32).encode(matrix)["values"].tolist() == [1e6, -1e6]


def test_true_bits_per_weight_count_everything() -> None:
    fmt = SparseOutliers(count=100)
    assert fmt.bits_per_weight(128, 256, torch.float32) == 8 * (100 * 4 + 4 * (2 * 4 + 1)) / (128 * 256)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"count": -1}, SpecError), ({"count": 1, "tile_rows": 0}, SpecError), ({"count": 1, "tile_rows": 257, "tile_columns": 256}, FormatError)],
)
def test_impossible_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        SparseOutliers(**options)


def test_refusals() -> None:
    assert SparseOutliers(count=256).why_illegal(8, 32) is None
    assert SparseOutliers(count=257).why_illegal(8, 32) == "count=257 is more than the 256 weights; use count <= 256"
    with pytest.raises(FormatError, match=r"keeps 2 weights, expected count=3"):
        SparseOutliers(count=3).pack(torch.tensor([[True, True]]), torch.ones(1, 2))


def test_compressed_programs_save_load_and_export_again(tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)).eval(), (randn(3, 16),))
    for site, spec in zip(program.sites(), ("sparse_outliers{count=40,tile_rows=8,tile_columns=8}", "sparse_outliers{count=0}"), strict=True):
        compress(program, site, parse_format(spec))
    back = load(save(tmp_path / "out", program)).program
    assert [t.dtype for t in back.sites()[0].payload().values()] == [torch.int32, torch.uint16, torch.float16]
    assert back.to_text() == program.to_text()
    assert_same(back.run_examples(), program.run_examples())
    assert_same(back.to_exported().module()(randn(3, 16)), program.run_examples())


def test_decode_can_be_traced() -> None:
    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fmt = SparseOutliers(count=7, tile_rows=2, tile_columns=8)
            for name, tensor in self.fmt.encode(randn(5, 16)).items():
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.fmt.decode(dict(self.named_buffers()), 5, 16, x.dtype).t()

    exported = torch.export.export(Decoded(), (randn(3, 16),))
    assert_same(exported.module()(randn(3, 16)), Decoded()(randn(3, 16)))
