"""Learned tables: stored values are the meaning, tables adapt to any data, zeros stay, true bit widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import FormatError, SpecError
from fxpress.ir.formats.affine import Affine, ScaleType
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.lut import Lut, TableType
from fxpress.runtime.artifact import load, save

from ...checks import assert_same, compress, relative_error
from ...tiny import randn, seeded


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Lut]:
    """A matrix of any scale and sparsity, and any format that is legal for it."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 24))
    generator = seeded(draw(st.integers(0, 2**31)))
    matrix = torch.randn(rows, columns, generator=generator) * 10 ** draw(st.floats(-3, 3))
    matrix = matrix * (torch.rand(rows, columns, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 1.0])))
    fmt = Lut(
        entries=draw(st.integers(2, 256) | st.integers(2, 9)),
        rows_per_table=draw(st.none() | st.integers(1, rows)),
        table=draw(st.sampled_from(TableType)),
        scale_dtype=draw(st.sampled_from(ScaleType)),
    )
    return matrix, fmt


def decoded(fmt: Lut, matrix: Tensor) -> Tensor:
    return fmt.decode(fmt.encode(matrix), len(matrix), matrix.shape[1], torch.float32)


@given(cases())
def test_decoding_looks_every_code_up(case: tuple[Tensor, Lut]) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix)
    codes, values = fmt.unpack(payload, *matrix.shape)
    assert values.shape == (len(matrix), fmt.entries)
    assert_same(fmt.decode(payload, len(matrix), matrix.shape[1], torch.float32), values.gather(1, codes.long()))
    width = fmt.rows_per_table or len(matrix)
    for n, row in enumerate(values):
        scale = payload["scale"][n].float() if fmt.scaled else 1.0
        assert_same(row, payload["table"][n // width].float() * scale)


@given(cases())
def test_codes_are_the_nearest(case: tuple[Tensor, Lut]) -> None:
    matrix, fmt = case
    codes, values = fmt.unpack(fmt.encode(matrix), *matrix.shape)
    distance = (matrix.double().unsqueeze(2) - values.double().unsqueeze(1)).abs()
    assert_same(codes.long(), distance.min(2).indices)


@given(cases())
def test_bytes_are_those_of_the_payload(case: tuple[Tensor, Lut]) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix)
    fmt.check_payload(payload, len(matrix), matrix.shape[1], torch.float32, "here")
    assert fmt.nbytes(len(matrix), matrix.shape[1], torch.float32) == sum(t.nbytes for t in payload.values())
    assert parse_format(fmt.to_spec()) == fmt


@given(cases())
def test_pack_inverts_unpack(case: tuple[Tensor, Lut]) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix)
    codes, _ = fmt.unpack(payload, *matrix.shape)
    assert_same(fmt.pack(codes, payload["table"], payload.get("scale")), payload)


@given(cases())
def test_zeros_stay_exactly_zero_where_there_are_enough(case: tuple[Tensor, Lut]) -> None:
    matrix, fmt = case
    got = decoded(fmt, matrix)
    for rows, result in zip(matrix.split(fmt.rows_per_table or len(matrix)), got.split(fmt.rows_per_table or len(matrix)), strict=True):
        if (rows == 0).float().mean() >= 0.1:
            assert bool((result[rows == 0] == 0).all())


@given(cases())
def test_stored_tables_are_within_half_a_step(case: tuple[Tensor, Lut]) -> None:
    """What `store` returns stands for the tables it was given, and keeps zeros."""
    matrix, fmt = case
    count = fmt.tables(len(matrix))
    tables, scale = matrix[:1].repeat(count, fmt.entries)[:, : fmt.entries] / (matrix[:1].abs().max() + 1e-3), matrix.abs().amax(1) + 1e-3
    tables[:, 0] = 0
    _, _, values = fmt.stored_values(tables, scale, *matrix.shape)
    wanted = fmt.spread(tables, len(matrix)) * scale[:, None]
    limit = {TableType.INT8: 0.0045, TableType.FLOAT16: 0.002, TableType.FLOAT32: 0.001}[fmt.table] * wanted.abs().amax(1, keepdim=True)
    small = 127 * 2.0**-24 * (wanted.abs().amax(1, keepdim=True) < 0.01)  # scales that are subnormal halves have few digits
    assert bool(((values - wanted).abs() <= limit + small).all())
    assert bool((values[:, 0] == 0).all())


@pytest.mark.parametrize("spec", ["lut{entries=4,table=float16}", "lut{entries=4,table=float16,rows_per_table=none}", "lut{entries=4}"])
def test_weights_beyond_half_precision_are_refused(spec: str) -> None:
    with pytest.raises(FormatError, match=r"float16 holds magnitudes up to 65504, got .*; store it as float32"):
        parse_format(spec).encode(torch.tensor([[1e8, 0.0, -1e8]]))
    wide = parse_format(spec.replace("table=float16", "table=float32").replace("}", ",scale_dtype=float32}"))
    assert_same(wide.decode(wide.encode(torch.tensor([[1e8, 0.0, -1e8]])), 1, 3, torch.float32).sign(), torch.tensor([[1.0, 0.0, -1.0]]))


def test_a_scale_just_beyond_half_precision_is_refused_not_rounded_to_infinity() -> None:
    with pytest.raises(FormatError, match="float16 holds magnitudes up to 65504"):
        parse_format("lut{entries=4}").encode(torch.tensor([[65510.0 * 127, 0.0]]))


@pytest.mark.parametrize(("entries", "limit"), [(2, 0.65), (4, 0.37), (7, 0.23), (8, 0.20), (16, 0.11), (64, 0.035)])
@pytest.mark.parametrize("options", [{}, {"table": "float16"}, {"rows_per_table": None}, {"rows_per_table": 8, "table": "float32"}])
def test_error_of_normal_weights(entries: int, limit: float, options: dict[str, Any]) -> None:
    matrix = randn(32, 256)
    assert relative_error(decoded(Lut(entries=entries, **options), matrix), matrix) < limit


def test_more_entries_err_less() -> None:
    matrix = randn(16, 512)
    errors = [relative_error(decoded(Lut(entries=e, table=TableType.FLOAT32), matrix), matrix) for e in (2, 3, 4, 6, 8, 12, 16, 32, 64, 128)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_beats_affine_rows_of_as_many_bits(bits: int) -> None:
    matrix = randn(32, 512)
    ours, uniform = decoded(Lut(entries=2**bits), matrix), decoded_affine(Affine(bits=bits), matrix)
    assert relative_error(ours, matrix) < 0.8 * relative_error(uniform, matrix)


def decoded_affine(fmt: Affine, matrix: Tensor) -> Tensor:
    return fmt.decode(fmt.encode(matrix), len(matrix), matrix.shape[1], torch.float32)


@pytest.mark.parametrize("table", TableType)
@pytest.mark.parametrize("rows_per_table", [1, 2, None])
def test_constant_and_zero_rows_and_few_distinct_values(table: TableType, rows_per_table: int | None) -> None:
    matrix = torch.tensor([[3.0] * 6, [0.0] * 6, [-2.0] * 6, [1.0, -1.0, 0.0, 1.0, 0.0, 0.0], [1e-3, 0.0, 0.0, 0.0, -1e-3, 1e-3]])
    got = decoded(Lut(entries=8, rows_per_table=rows_per_table, table=table), matrix)
    torch.testing.assert_close(got, matrix, rtol=0.006, atol=0)
    assert bool((got[matrix == 0] == 0).all())


def test_float32_tables_of_few_distinct_values_are_exact() -> None:
    matrix = randn(5)[torch.randint(5, (4, 50), generator=seeded())]
    assert_same(decoded(Lut(entries=5, table=TableType.FLOAT32), matrix), matrix)


def test_short_last_group_has_its_own_table() -> None:
    matrix = torch.cat([randn(4, 40), 2 + 0.1 * randn(1, 40, seed=1)])
    fmt = Lut(entries=4, rows_per_table=2)
    assert fmt.encode(matrix)["table"].shape == (3, 4)
    torch.testing.assert_close(decoded(fmt, matrix)[4:], decoded(Lut(entries=4), matrix)[4:], rtol=2e-3, atol=0)
    assert relative_error(decoded(fmt, matrix)[4:], matrix[4:]) < 0.05


def test_zeros_survive_when_only_some_weights_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.ir.formats.lut.ENOUGH_SAMPLES", 8)
    matrix = randn(16, 20)
    matrix[:, ::5] = 0
    got = decoded(Lut(entries=4, rows_per_table=None), matrix)
    assert bool((got[matrix == 0] == 0).all())
    assert relative_error(got, matrix) < 0.8


def test_true_bits_per_weight_count_everything() -> None:
    assert Lut(entries=8).bits_per_weight(64, 256, torch.float32) == 3 + 8 * 8 / 256 + 16 / 256
    assert Lut(entries=16, table=TableType.FLOAT16).bits_per_weight(64, 256, torch.float32) == 4 + 16 * 16 / 256
    assert Lut(entries=16, rows_per_table=None).bits_per_weight(64, 256, torch.float32) == 4 + 16 / 256 + 16 * 8 / (64 * 256)


@pytest.mark.parametrize(("entries", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 5), (129, 8), (256, 8)])
def test_bits_of_a_code(entries: int, bits: int) -> None:
    assert Lut(entries=entries).bits == bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decode_computes_in_single_precision_and_rounds_once(dtype: torch.dtype) -> None:
    fmt = Lut(entries=16)
    payload = fmt.encode(randn(8, 64))
    assert_same(fmt.decode(payload, 8, 64, dtype), fmt.decode(payload, 8, 64, torch.float32).to(dtype))


@pytest.mark.parametrize("options", [{"entries": 1}, {"entries": 257}, {"entries": 4, "rows_per_table": 0}, {"entries": 4, "table": "int4"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        Lut(**options)


def test_refusals() -> None:
    assert Lut(entries=4, rows_per_table=8).why_illegal(8, 32) is None
    assert Lut(entries=4, rows_per_table=9).why_illegal(8, 32) == "rows_per_table=9 is more than the 8 rows; use rows_per_table <= 8 or none (one table)"
    with pytest.raises(FormatError, match="need their scales"):
        Lut(entries=4, rows_per_table=2).store(randn(3, 4))


def test_compressed_programs_save_load_and_export_again(tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)).eval(), (randn(3, 16),))
    for site, spec in zip(program.sites(), ("lut{entries=6}", "lut{entries=16,rows_per_table=4,table=float16}"), strict=True):
        compress(program, site, parse_format(spec))
    back = load(save(tmp_path / "out", program)).program
    assert back.to_text() == program.to_text()
    assert_same(back.run_examples(), program.run_examples())
    assert_same(back.to_exported().module()(randn(3, 16)), program.run_examples())


def test_decode_can_be_traced() -> None:
    class Decoded(nn.Module):
        def __init__(self, fmt: Lut) -> None:
            super().__init__()
            self.fmt = fmt
            for name, tensor in fmt.encode(randn(5, 16)).items():
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.fmt.decode(dict(self.named_buffers()), 5, 16, x.dtype).t()

    for fmt in (Lut(entries=6), Lut(entries=16, rows_per_table=2), Lut(entries=4, rows_per_table=None)):
        exported = torch.export.export(Decoded(fmt), (randn(3, 16),))
        assert_same(exported.module()(randn(3, 16)), Decoded(fmt)(randn(3, 16)))
