"""Every width, sharing and site kind through ONNX Runtime: exact without optimizations, small on disk, fused where the report says so."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.codegen.onnx_target import OnnxReport

# Widths that fill their container and widths that do not; test_affine.py has all eight, of linears, embeddings and convs, side by side in one file.
WIDTHS = [pytest.param(bits, marks=[] if bits in (1, 3, 4, 8) else pytest.mark.slow) for bits in range(1, 9)]
OPTIONS = ["group_size=16", "group_size=16,symmetric=true", "group_size=48", "symmetric=true", "granularity=tensor", "group_size=24"]


class Kinds(nn.Module):
    """One site of every kind; 80 columns leave a short last group of every size tested."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 80)
        self.conv = nn.Conv1d(80, 80, 3, padding=1, groups=2)
        self.linear = nn.Linear(80, 72)
        self.weight = nn.Parameter(torch.randn(72, 32) / 8)
        self.image = nn.Conv2d(1, 4, 3, stride=2, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, S] -> [B, 4, S/2, 16]`."""
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = torch.relu(self.linear(x)) @ self.weight
        out: Tensor = self.image(x.unsqueeze(1))
        return out


def export(model: nn.Module, spec: str, path: Path, *example: Tensor, **options: object) -> tuple[fxpress.Result, OnnxReport]:
    """Optimize and export."""
    result = fxpress.optimize(model.eval(), spec, example_inputs=example)
    return result, result.export_onnx(path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_width_and_sharing_is_exact(bits: int, option: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = f"quantize_rtn{{bits={bits},{option},kinds=[linear,mm,conv1d,conv2d,embedding],allow_empty=true}}"
    result, report = export(Kinds(), spec, tmp_path / "m.onnx", torch.randint(0, 40, (2, 8)))
    assert report.max_error < 1e-4
    taken = {t.site for t in result.reports[0].taken}
    assert {s.site for s in report.lowering.sites if s.form != "" and "decoded" not in s.why and s.format != "dense"} == taken
    model = onnx.load(tmp_path / "m.onnx")
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    dense = {s.name: s.parameters for s in result.program.sites() if not s.compressed}
    assert sum(torch.Size(t.dims).numel() for t in floats) <= sum(dense.values()) + 1200  # biases and scales: no dense copy of a compressed weight is left


class Wide(nn.Module):
    """Two linears wide enough that the file is weights, not graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 256] -> [B, 256]`."""
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


@pytest.mark.parametrize(("bits", "container"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_file_size_is_the_reported_bytes_and_the_weights_are_fused(bits: int, container: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, report = export(Wide(), f"quantize_rtn{{bits={bits},group_size=64}}", tmp_path / "m.onnx", torch.randn(3, 256))
    assert report.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.file_bytes <= 1.02 * report.lowering.nbytes + 8192
    assert report.lowering.nbytes < 2 * 256 * 1024 * (container + 0.6) / 8 + 6000
    assert report.fused == 2 and all(s.fused for s in report.lowering.sites)
    if bits != container:
        assert all(f"{container}" in s.why for s in report.lowering.sites)


def test_tied_dense_weight_is_stored_once_and_a_quantized_tied_head_is_not_skipped(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(500, 64), nn.Linear(64, 500, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids))
            return out

    ids = torch.randint(0, 500, (2, 5))
    program = fxpress.capture(Tied().eval(), (ids,))
    from fxpress.codegen.onnx_target import export_onnx

    dense = export_onnx(program, tmp_path / "dense.onnx")
    assert dense.file_bytes < 1.1 * 500 * 64 * 4
    _, report = export(Tied(), "quantize_rtn{bits=4,group_size=32}", tmp_path / "m.onnx", ids)
    forms = {s.site: s for s in report.lowering.sites}
    assert forms["head"].fused and "MatMul" in forms["head"].form
    assert report.fused == 1


def test_external_data_and_dynamic_axes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", max=64)
    result = fxpress.optimize(Wide().eval(), "quantize_rtn{bits=4,group_size=64}", example_inputs=(torch.randn(3, 256),), dynamic_shapes=({0: batch},))
    report = result.export_onnx(tmp_path / "m.onnx", external_data=True)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert report.external_data and len({tuple(c.sizes.values()) for c in report.checks}) == 2
    assert onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_report_reads_as_text_with_one_line_per_form(tmp_path: Path) -> None:
    _, report = export(Wide(), "quantize_rtn{bits=4,group_size=64}", tmp_path / "m.onnx", torch.randn(3, 256))
    text = str(report)
    assert "2 x affine{bits=4,group_size=64} -> DequantizeLinear" in text and "up, down" in text
    assert f"{report.file_bytes / 1e6:.2f} MB on disk" in text and "2 MatMulNBits nodes" in text
