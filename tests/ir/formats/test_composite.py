"""Sums of formats: every part counts, nothing else does."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import FormatError, SpecError
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.composite import Composite
from fxpress.runtime.artifact import load, save

from ...checks import assert_same, compress, relative_error
from ...tiny import randn, seeded

PARTS = ("lut{entries=4}", "affine{bits=2}", "sparse_outliers{count=3}", "dense{storage=float16}", "affine{bits=8,group_size=2,symmetric=true}", "dense")
SPLIT = Composite(parts=("sparse_outliers{count=20}", "lut{entries=8}"))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Composite]:
    """A matrix and two or three parts."""
    matrix = torch.randn(draw(st.integers(1, 5)), draw(st.integers(3, 20)), generator=seeded(draw(st.integers(0, 2**31))))
    return matrix, Composite(parts=tuple(draw(st.lists(st.sampled_from(PARTS), min_size=2, max_size=3))))


@given(cases())
def test_decodes_to_the_sum_of_its_parts(case: tuple[Tensor, Composite]) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix)
    parts = fmt.split(payload, len(matrix), matrix.shape[1], torch.float32)
    assert tuple(f.to_spec() for f, _ in parts) == fmt.parts
    decoded = [f.decode(p, len(matrix), matrix.shape[1], torch.float32) for f, p in parts]
    assert_same(fmt.decode(payload, len(matrix), matrix.shape[1], torch.float32), reduce(torch.add, decoded))
    assert_same(fmt.join([p for _, p in parts]), payload)


@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_bytes_are_those_of_the_payload(case: tuple[Tensor, Composite], dtype: torch.dtype) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix.to(dtype))
    fmt.check_payload(payload, len(matrix), matrix.shape[1], dtype, "here")
    parts = [f.nbytes(len(matrix), matrix.shape[1], dtype) for f in fmt.formats]
    assert fmt.nbytes(len(matrix), matrix.shape[1], dtype) == sum(t.nbytes for t in payload.values()) == sum(parts)
    assert parse_format(fmt.to_spec()) == fmt


@given(cases())
def test_each_part_encodes_what_is_left(case: tuple[Tensor, Composite]) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix)
    rest = matrix
    for part, stored in fmt.split(payload, len(matrix), matrix.shape[1], torch.float32):
        assert_same(part.encode(rest), stored)
        rest = rest - part.decode(stored, len(matrix), matrix.shape[1], torch.float32)


def test_outliers_apart_leave_a_better_table() -> None:
    matrix = randn(16, 64)
    matrix.view(-1)[torch.randperm(1024, generator=seeded())[:20]] *= 30
    plain = parse_format("lut{entries=8}")
    errors = [relative_error(f.decode(f.encode(matrix), 16, 64, torch.float32), matrix) for f in (SPLIT, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_names_and_bits() -> None:
    assert list(SPLIT.payload_spec(16, 64, torch.float32)) == [
        "part0_tile_starts", "part0_positions", "part0_values", "part1_codes", "part1_table", "part1_scale",
    ]  # fmt: skip
    assert SPLIT.bits_per_weight(16, 64, torch.float32) == 8 * (8 + 20 * 4) / 1024 + 3 + 8 * 8 / 64 + 16 / 64


def test_specs_are_written_in_their_shortest_form() -> None:
    fmt = parse_format("composite{parts=['affine{ bits=4, symmetric=false }','dense{storage=same}']}")
    assert fmt.to_spec() == "composite{parts=['affine{bits=4}',dense]}"
    assert parse_format(fmt.to_spec()) == fmt


@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        ((), SpecError, r"at least two parts, got 0; for example composite\{parts"),
        (("dense",), SpecError, "at least two parts, got 1"),
        (("dense", "affine"), SpecError, "missing option 'bits'"),
        (("dense", "afine{bits=4}"), FormatError, "did you mean 'affine'"),
        (("dense", "composite{parts=[dense,dense]}"), FormatError, "a part is a composite itself"),
    ],
)
def test_impossible_parts_are_refused(parts: tuple[str, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Composite(parts=parts)


def test_refusals() -> None:
    assert SPLIT.why_illegal(16, 64) is None
    assert SPLIT.why_illegal(1, 19) == "part sparse_outliers: count=20 is more than the 19 weights; use count <= 19"
    with pytest.raises(FormatError, match="expected 2 payloads, got 1"):
        SPLIT.join([{}])


def test_compressed_programs_save_load_and_export_again(tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)).eval(), (randn(3, 16),))
    for site, spec in zip(program.sites(), (SPLIT.to_spec(), "composite{parts=['affine{bits=2}','affine{bits=4,group_size=4}']}"), strict=True):
        compress(program, site, parse_format(spec))
    back = load(save(tmp_path / "out", program)).program
    assert [s.name for s in back.sites()] == [s.name for s in program.sites()]
    assert back.to_text() == program.to_text()
    assert_same(back.run_examples(), program.run_examples())
    assert_same(back.to_exported().module()(randn(3, 16)), program.run_examples())
