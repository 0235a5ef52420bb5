"""The contract of every weight format, walked over all of them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxpress.ir.errors import FormatError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.formats.base import TensorSpec, WeightFormat, format_class, format_names, name_payload, parse_format
from fxpress.ir.formats.dense import Dense

from ...checks import assert_same, relative_error
from ...tiny import randn

SPECS = [
    "dense", "dense{storage=float16}", "dense{storage=bfloat16}", "affine{bits=8}", "affine{bits=4,group_size=16}", "affine{bits=3,group_size=7}",
    "affine{bits=2,symmetric=true}", "affine{bits=1,symmetric=true}", "affine{bits=5,granularity=tensor}", "affine{bits=6,scale_dtype=float32}",
]  # fmt: skip


def test_formats_are_found_by_file_name() -> None:
    assert {"affine", "dense"} <= set(format_names())
    assert not {"base", "bitpack"} & set(format_names())
    assert format_class("affine") is Affine


def test_unknown_formats_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"unknown weight format 'afine' \(did you mean 'affine'\?\); formats are affine,.*dense"):
        parse_format("afine{bits=4}")


@pytest.mark.parametrize("spec", SPECS)
def test_spec_round_trips(spec: str) -> None:
    fmt = parse_format(spec)
    assert parse_format(fmt.to_spec()) == fmt
    assert type(fmt).from_dict(fmt.to_dict()) == fmt
    assert hash(fmt) == hash(parse_format(spec))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("rows", "columns"), [(12, 40), (1, 17), (5, 16)])
def test_payload_is_what_the_format_says(spec: str, rows: int, columns: int) -> None:
    fmt, matrix = parse_format(spec), randn(rows, columns)
    payload = fmt.encode(matrix)
    fmt.check_payload(payload, rows, columns, torch.float32, "here")
    assert fmt.nbytes(rows, columns, torch.float32) == sum(t.nbytes for t in payload.values())
    assert fmt.bits_per_weight(rows, columns, torch.float32) == pytest.approx(8 * sum(t.nbytes for t in payload.values()) / matrix.numel())
    assert_same(name_payload(fmt, list(payload.values()), rows, columns, torch.float32), payload)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_decode_gives_the_asked_shape_and_type(spec: str, dtype: torch.dtype) -> None:
    fmt, matrix = parse_format(spec), randn(6, 32).to(dtype)
    payload = fmt.encode(matrix)
    decoded = fmt.decode(payload, 6, 32, dtype)
    assert (decoded.shape, decoded.dtype) == ((6, 32), dtype)
    assert relative_error(decoded, fmt.decode(payload, 6, 32, torch.float64)) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("spec", SPECS)
def test_decode_traces_with_fake_tensors(spec: str) -> None:
    fmt = parse_format(spec)
    payload = fmt.encode(randn(6, 32))
    with FakeTensorMode() as mode:
        fake = fmt.decode({k: mode.from_tensor(t) for k, t in payload.items()}, 6, 32, torch.float32)
    assert (fake.shape, fake.dtype) == ((6, 32), torch.float32)


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "missing"])
def test_wrong_payloads_are_refused_with_place_and_both_sides(change: str) -> None:
    fmt: WeightFormat = Affine(bits=4)
    payload = fmt.encode(randn(4, 8))
    codes = payload.pop("codes")
    payload |= {
        "name": {"code": codes}, "shape": {"codes": codes[:, :3]}, "dtype": {"codes": codes.to(torch.int32)}, "missing": {},
    }[change]  # fmt: skip
    with pytest.raises(FormatError, match=r"payload of affine\{bits=4\} at layer.0 \(weight \[4, 8\]\): expected .* got"):
        fmt.check_payload(payload, 4, 8, torch.float32, "layer.0")


def test_tensor_spec_counts_bytes() -> None:
    assert TensorSpec((3, 5), torch.float16).nbytes == 30
    assert TensorSpec((), torch.float32).nbytes == 4


def test_any_shape_is_legal_unless_a_format_says_otherwise() -> None:
    assert Dense().why_illegal(1, 1) is None
