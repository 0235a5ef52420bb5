"""Affine weights in ONNX files: every width, sharing and kind of site, against double precision, exact and fused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from fxpress.codegen.onnx_target import OnnxReport, export_onnx
from fxpress.ir.formats.affine import Affine, Granularity, ScaleType
from fxpress.ir.program import Program

from .sides import Side, Tied, compressed, shared, side_by_side

Sharing = int | Granularity
SHARINGS: tuple[Sharing, ...] = (Granularity.TENSOR, Granularity.CHANNEL, 16, 24, 32, 48, 64)
COMBINATIONS = tuple(itertools.product(range(1, 9), (True, False), SHARINGS))


def affine(bits: int, symmetric: bool, sharing: Sharing, scales: ScaleType = ScaleType.FLOAT16) -> Affine:
    if isinstance(sharing, int):
        return Affine(bits=bits, symmetric=symmetric, group_size=sharing, scale_dtype=scales)
    return Affine(bits=bits, symmetric=symmetric, granularity=sharing, scale_dtype=scales)


FORMATS = [affine(*c) for c in COMBINATIONS]


def export(program: Program, folder: Path, **options: Any) -> tuple[OnnxReport, onnx.ModelProto]:
    report = export_onnx(program, folder / "model.onnx", **options)
    return report, onnx.load(str(folder / "model.onnx"))


def worst(errors: list[float], bound: float) -> dict[str, float]:
    return {str(c): e for c, e in zip(COMBINATIONS, errors, strict=True) if e > bound}


@pytest.mark.parametrize("opset", [None, 21])
def test_linears(tmp_path: Path, opset: int | None) -> None:
    report, exact, fused = side_by_side(lambda: nn.Linear(100, 10), torch.randn(3, 100), FORMATS, tmp_path, opset=opset)
    assert report.opset == (opset or 25), "2-bit integers ask for opset 25"
    assert not worst(exact, 1e-6)
    assert not worst(fused, 3e-2), "MatMulNBits rounds activations to 8 bits; more than this is wrong weights"
    assert [s.fused for s in report.lowering.sites] == [c[2] != 24 for c in COMBINATIONS], "24 has no power-of-two divisor of 16 or more"


def test_embeddings(tmp_path: Path) -> None:
    report, exact, fused = side_by_side(lambda: nn.Embedding(20, 100), torch.randint(20, (2, 3)), FORMATS, tmp_path)
    assert not worst(exact, 1e-6)
    assert not worst(fused, 1e-6)
    assert all(s.form.startswith("Gather") for s in report.lowering.sites)


def test_convolutions(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Conv2d(16, 6, (2, 4), groups=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2))

    report, exact, fused = side_by_side(make, torch.randn(2, 16, 9, 9), FORMATS, tmp_path)
    assert report.opset == 21
    assert not worst(exact, 1e-6)
    assert not worst(fused, 1e-6)


def test_unbatched_signals(tmp_path: Path) -> None:
    program = compressed(nn.Conv1d(8, 5, 3, padding=1), torch.randn(8, 12), [Affine(bits=4)])
    assert export(program, tmp_path)[0].max_error < 5e-6


def test_float32_scales(tmp_path: Path) -> None:
    formats = [affine(4, s, g, ScaleType.FLOAT32) for s in (True, False) for g in (Granularity.TENSOR, Granularity.CHANNEL, 32)]
    report, model = export(compressed(Side([nn.Linear(64, 8) for _ in formats]), torch.randn(3, 64), formats), tmp_path)
    assert report.max_error < 5e-6
    assert {t.data_type for t in model.graph.initializer if t.name.endswith("scale")} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(
    ("fmt", "kind", "nbytes"),
    [
        (Affine(bits=4, group_size=64), onnx.TensorProto.UINT4, 32 * 128 // 2 + 2 * 32 * 2 + 2 * 32 // 2),
        (Affine(bits=4, group_size=64, symmetric=True), onnx.TensorProto.INT4, 32 * 128 // 2 + 2 * 32 * 2),
        (Affine(bits=2, group_size=32), onnx.TensorProto.UINT2, 32 * 128 // 4 + 4 * 32 * 2 + 4 * 32 // 4),
        (Affine(bits=8, symmetric=True), onnx.TensorProto.INT8, 32 * 128 + 32 * 2),
        (Affine(bits=3, group_size=64, symmetric=True), onnx.TensorProto.INT4, 32 * 128 // 2 + 2 * 32 * 2),
    ],
)
def test_initializers_are_low_bit(tmp_path: Path, fmt: Affine, kind: int, nbytes: int) -> None:
    report, model = export(compressed(nn.Linear(128, 32, bias=False), torch.randn(3, 128), [fmt]), tmp_path)
    stored = {t.name.rpartition("_")[2]: t for t in model.graph.initializer}
    assert stored["codes"].data_type == kind
    assert stored["scale"].data_type == onnx.TensorProto.FLOAT16
    assert report.lowering.nbytes == sum(len(t.raw_data) for t in model.graph.initializer) == nbytes == report.lowering.sites[0].nbytes
    assert report.fused == 1
    assert ("container" in report.lowering.sites[0].why) == (fmt.bits == 3)


def test_a_group_of_48_stores_each_scale_once(tmp_path: Path) -> None:
    report, model = export(compressed(nn.Linear(100, 8), torch.randn(3, 100), [Affine(bits=4, group_size=48)]), tmp_path)
    scale = next(t for t in model.graph.initializer if t.name.endswith("scale"))
    assert list(scale.dims) == [3, 1, 8]
    assert report.fused == 1
    assert "blocks of 16" in report.lowering.sites[0].why


@pytest.mark.parametrize(
    ("bits", "group_size", "kind", "block"),
    [(2, 16, "UINT4", 16), (2, 48, "UINT4", 16), (2, 32, "UINT2", 32), (2, 256, "UINT2", 128), (4, 512, "UINT4", 256), (8, 1024, "UINT8", None)],
)
def test_blocks_are_those_with_fast_kernels(tmp_path: Path, bits: int, group_size: int, kind: str, block: int | None) -> None:
    report, model = export(compressed(nn.Linear(1024, 8), torch.randn(3, 1024), [Affine(bits=bits, group_size=group_size)]), tmp_path)
    (dequantize,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear")
    assert next((a.i for a in dequantize.attribute if a.name == "block_size"), None) == block
    codes = next(t for t in model.graph.initializer if t.name == dequantize.input[0])
    assert codes.data_type == getattr(onnx.TensorProto, kind)
    assert report.fused == 1
    assert report.max_error < 5e-6
    assert report.fused_error < 3e-2


def test_two_bits_get_padding_columns_for_onnx_runtime(tmp_path: Path) -> None:
    report, model = export(compressed(nn.Linear(64, 10), torch.randn(3, 64), [Affine(bits=2, group_size=32)]), tmp_path)
    assert list(next(t for t in model.graph.initializer if t.name.endswith("codes")).dims) == [64, 12]
    assert report.fused == 1
    assert report.fused_error < 3e-2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 32)])
def test_a_linear_before_relu_is_fused_too(tmp_path: Path, bias: bool, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(32, 48, bias=bias), nn.ReLU(), nn.Linear(48, 8, bias=bias), nn.ReLU6(), nn.Linear(8, 4))
    assert export(compressed(model, torch.randn(shape), [Affine(bits=4)] * 3), tmp_path)[0].fused == 3


def test_a_weight_with_several_readers_is_stored_once(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64, bias=False)
    program = shared(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 64), Affine(bits=4))
    report, _ = export(program, tmp_path)
    assert [s.nbytes > 0 for s in report.lowering.sites] == [True, False]
    assert report.lowering.nbytes < 1.1 * program.nbytes
    assert "one reader only" in report.lowering.sites[0].why
    assert report.max_error < 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_tied_8_bit_codes_are_stored_once_and_fused(tmp_path: Path, symmetric: bool, group_size: int | None) -> None:
    program = shared(Tied(), torch.randint(40, (2, 3)), Affine(bits=8, symmetric=symmetric, group_size=group_size))
    report, model = export(program, tmp_path)
    assert [list(t.dims) for t in model.graph.initializer if t.name.endswith("codes")] == [[40, 64]]
    assert report.fused == 1
    assert report.max_error < 5e-6
    assert report.lowering.nbytes < program.nbytes + 400


def test_float16_models(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 8)).half()
    program = compressed(model, torch.randn(3, 64).half(), [Affine(bits=4, group_size=32), Affine(bits=4, scale_dtype=ScaleType.FLOAT32)])
    report, _ = export(program, tmp_path)
    assert [s.fused for s in report.lowering.sites] == [True, False]
    assert "float32 scales in a float16 model" in report.lowering.sites[1].why
    assert report.max_error < 5e-3
