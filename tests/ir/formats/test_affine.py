"""Affine quantization: half a step of error, exact zeros, stored scales, every granularity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.errors import FormatError, SpecError
from fxpress.ir.formats.affine import Affine, Granularity, ScaleType

from ...checks import assert_same, relative_error
from ...tiny import randn, seeded


@st.composite
def formats(draw: st.DrawFn, /, columns: int, **fixed: Any) -> Affine:
    """Any affine format that is legal for `columns`."""
    groups = draw(st.none() | st.integers(1, columns))
    granularity = Granularity.GROUP if groups else draw(st.sampled_from([Granularity.TENSOR, Granularity.CHANNEL, None]))
    options: dict[str, Any] = {"bits": draw(st.integers(1, 8)), "symmetric": draw(st.booleans()), "scale_dtype": draw(st.sampled_from(ScaleType))}
    return Affine(group_size=groups, granularity=granularity, **(options | fixed))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Matrices of any scale, offset and sparsity."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 24)))
    generator = seeded(draw(st.integers(0, 2**31)))
    matrix = torch.randn(shape, generator=generator) * 10 ** draw(st.floats(-3, 3)) + draw(st.sampled_from([0.0, 0.5, -4.0]))
    return matrix * (torch.rand(shape, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 1.0])))


@st.composite
def cases(draw: st.DrawFn, /, **fixed: Any) -> tuple[Tensor, Affine]:
    matrix = draw(matrices())
    return matrix, draw(formats(matrix.shape[1], **fixed))


def decoded(fmt: Affine, matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    return fmt.decode(fmt.encode(matrix), rows, columns, torch.float32)


def steps(fmt: Affine, matrix: Tensor) -> Tensor:
    """The stored scale of every weight, `[N, K]`."""
    scale = fmt.encode(matrix)["scale"].float().unsqueeze(-1)
    return fmt.ungroup(scale.expand_as(fmt.group(matrix)), *matrix.shape)


@given(cases())
def test_error_is_at_most_half_a_step(case: tuple[Tensor, Affine]) -> None:
    matrix, fmt = case
    assume(fmt.bits > 1 or not fmt.symmetric)  # one symmetric bit keeps the sign and the mean magnitude: no such bound
    bound = steps(fmt, matrix) * (0.5 + 2**-12) + 1e-6 * matrix.abs()  # stored scales are rounded up, so the grid spans the range; the rest is fp32 rounding
    assert bool(((decoded(fmt, matrix) - matrix).abs() <= bound).all())


@given(cases())
def test_zeros_stay_exactly_zero(case: tuple[Tensor, Affine]) -> None:
    matrix, fmt = case
    assume(fmt.bits > 1 or not fmt.symmetric)
    assert bool((decoded(fmt, matrix)[matrix == 0] == 0).all())


@given(cases())
def test_bytes_are_those_of_the_payload(case: tuple[Tensor, Affine]) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix)
    rows, columns = matrix.shape
    fmt.check_payload(payload, rows, columns, torch.float32, "here")
    assert fmt.nbytes(rows, columns, torch.float32) == sum(t.nbytes for t in payload.values())


@given(cases())
def test_rounding_on_a_given_grid_is_a_projection(case: tuple[Tensor, Affine]) -> None:
    matrix, fmt = case
    codes, scale, zero = fmt.unpack(fmt.encode(matrix), *matrix.shape)
    assert_same(fmt.quantize(fmt.dequantize(codes, scale, zero), scale, zero), codes)


@given(cases())
def test_pack_inverts_unpack(case: tuple[Tensor, Affine]) -> None:
    matrix, fmt = case
    payload = fmt.encode(matrix)
    assert_same(fmt.pack(*fmt.unpack(payload, *matrix.shape)), payload)


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(cases(symmetric=False))
def test_encoding_again_changes_nothing(case: tuple[Tensor, Affine]) -> None:
    """True of ranges that fill their grid; a symmetric grid has one more negative than positive code, so its range can move."""
    matrix, fmt = case
    codes, scale, zero = fmt.unpack(fmt.encode(matrix), *matrix.shape)
    used = fmt.group(codes.float(), fill=float("nan"))
    low, high = used.nan_to_num(nan=999.0).amin(-1), used.nan_to_num(nan=-1.0).amax(-1)
    assume(bool(((torch.minimum(low, zero) == 0) & (torch.maximum(high, zero) == fmt.levels - 1)).all()))
    once = fmt.dequantize(codes, scale, zero)
    torch.testing.assert_close(decoded(fmt, once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.007), (6, 0.03), (4, 0.12), (3, 0.25), (2, 0.55)])
def test_error_of_normal_weights(bits: int, symmetric: bool, limit: float) -> None:
    matrix = randn(64, 256)
    assert relative_error(decoded(Affine(bits=bits, group_size=64, symmetric=symmetric), matrix), matrix) < limit


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("magnitude", [1e3, 1.0, 1e-2, 1e-3, 3e-4])
def test_half_precision_scales_hold_small_weights(bits: int, magnitude: float) -> None:
    matrix = magnitude * randn(64, 256)
    half, single = (relative_error(decoded(Affine(bits=bits, group_size=64, scale_dtype=s), matrix), matrix) for s in (ScaleType.FLOAT16, ScaleType.FLOAT32))
    assert half < 1.3 * single


def test_scales_are_rounded_before_the_codes_are_chosen() -> None:
    matrix = randn(8, 64)
    half, single = Affine(bits=8), Affine(bits=8, scale_dtype=ScaleType.FLOAT32)
    scale, zero = half.min_max(matrix)
    assert_same(half.encode(matrix)["scale"].float(), scale)
    naive = half.dequantize(single.quantize(matrix, *single.min_max(matrix)), scale, zero)
    assert relative_error(decoded(half, matrix), matrix) <= relative_error(naive, matrix)


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"granularity": "tensor"}, (1, 1)), ({"granularity": "channel"}, (3, 1)), ({}, (3, 1)), ({"group_size": 4}, (3, 3)), ({"group_size": 5}, (3, 2)),
        ({"group_size": 10}, (3, 1)), ({"group_size": 1}, (3, 10)),
    ],
)  # fmt: skip
def test_granularity(options: dict[str, Any], grid: tuple[int, int]) -> None:
    fmt = Affine(bits=4, **options)
    assert fmt.encode(randn(3, 10))["scale"].shape == grid == fmt.grid(3, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decode_computes_in_single_precision_and_rounds_once(dtype: torch.dtype) -> None:
    fmt = Affine(bits=8, scale_dtype=ScaleType.FLOAT32)
    payload = fmt.encode(randn(8, 64))
    assert_same(fmt.decode(payload, 8, 64, dtype), fmt.decode(payload, 8, 64, torch.float32).to(dtype))


def test_short_last_group_has_its_own_range() -> None:
    matrix = torch.cat([randn(4, 8), 100 * randn(4, 3, seed=1)], dim=1)
    fmt = Affine(bits=4, group_size=8)
    payload = fmt.encode(matrix)
    assert payload["scale"].shape == (4, 2)
    assert_same(decoded(fmt, matrix)[:, :8], decoded(Affine(bits=4), matrix[:, :8]))
    assert_same(decoded(fmt, matrix)[:, 8:], decoded(Affine(bits=4), matrix[:, 8:]))


def test_finer_sharing_is_never_much_worse() -> None:
    matrix = randn(32, 128) * torch.logspace(-1, 1, 32)[:, None] * torch.logspace(-0.5, 0.5, 128)
    sharing: list[dict[str, Any]] = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 32}]
    errors = [float((decoded(Affine(bits=4, **o), matrix) - matrix).norm()) for o in sharing]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_one_symmetric_bit_is_sign_times_mean_magnitude() -> None:
    matrix = randn(3, 16)
    expected = torch.where(matrix >= 0, 1.0, -1.0) * matrix.abs().mean(1, keepdim=True)
    torch.testing.assert_close(decoded(Affine(bits=1, symmetric=True), matrix), expected, rtol=1e-3, atol=0)


def test_extreme_and_constant_rows() -> None:
    matrix = torch.tensor([[0.0, 0.0, 0.0], [3.0, 3.0, 3.0], [-2.0, -2.0, -2.0], [1e-30, 0.0, -1e-30], [6e4, -6e4, 1.0]])
    got = decoded(Affine(bits=8), matrix)
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got[:3], matrix[:3], rtol=1e-3, atol=0)


def test_known_codes() -> None:
    fmt = Affine(bits=2, scale_dtype=ScaleType.FLOAT32)
    payload = fmt.encode(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    assert payload["scale"].tolist() == [[1.0]]
    assert payload["zero_point"].tolist() == [[1]]
    assert payload["codes"].tolist() == [[0b11100100]]


def test_true_bits_per_weight_count_everything() -> None:
    assert Affine(bits=4, group_size=128).bits_per_weight(64, 256, torch.float32) == 4 + 16 / 128 + 8 / 256  # two 4-bit zero points a row
    assert Affine(bits=4, group_size=128, symmetric=True).bits_per_weight(64, 256, torch.float32) == 4 + 16 / 128
    assert Affine(bits=3, symmetric=True).bits_per_weight(1, 10, torch.float32) == 8 * (4 + 2) / 10


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bits": 0}, SpecError), ({"bits": 9}, SpecError), ({"bits": 4, "group_size": 0}, SpecError), ({"bits": 4, "granularity": "row"}, SpecError),
        ({"bits": 4, "granularity": "group"}, FormatError), ({"bits": 4, "group_size": 8, "granularity": "channel"}, FormatError),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Affine(**options)


def test_group_wider_than_the_row_is_illegal() -> None:
    assert Affine(bits=4, group_size=32).why_illegal(8, 32) is None
    assert Affine(bits=4, group_size=33).why_illegal(8, 32) == "group_size=33 is wider than the 32 columns; use group_size <= 32 or none (per channel)"
