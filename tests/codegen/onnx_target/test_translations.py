"""Our translations of attention and pooling, and the RMS norm's rewrite, against torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.codegen.onnx_target import OnnxReport, export_onnx
from fxpress.ir.capture import capture


class Attend(nn.Module):
    """Attention over random heads; `options` go to the operator."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **self.options)  # type: ignore[arg-type]


def exported(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> tuple[OnnxReport, Counter[str]]:
    report = export_onnx(capture(model.eval(), inputs), folder / "model.onnx")
    return report, Counter(n.op_type for n in onnx.load(str(folder / "model.onnx")).graph.node)


def heads(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 5, 8, dtype=dtype), torch.randn(2, 4, 6, 8, dtype=dtype), torch.randn(2, 4, 6, 8, dtype=dtype)


def mask_with_an_empty_row() -> Tensor:
    mask = torch.rand(2, 1, 5, 6) > 0.3
    mask[0, 0, 2] = False
    return mask


@pytest.mark.parametrize("mask", [None, torch.randn(2, 1, 5, 6), mask_with_an_empty_row()], ids=["none", "float", "boolean"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_attention(tmp_path: Path, mask: Tensor | None, scale: float | None) -> None:
    report, ops = exported(Attend(scale=scale), heads() if mask is None else (*heads(), mask), tmp_path)
    assert report.max_error < 1e-5
    assert "Shape" not in ops
    assert (ops["MatMul"], ops["Transpose"], ops["Mul"]) == (2, 1, 1)


def test_float16_attention(tmp_path: Path) -> None:
    report, _ = exported(Attend(), (*heads(torch.float16), mask_with_an_empty_row()), tmp_path)
    assert report.max_error < 1e-2


def test_causal_attention_is_left_to_torch(tmp_path: Path) -> None:
    report, _ = exported(Attend(is_causal=True), heads(), tmp_path)
    assert report.max_error < 1e-5


def test_attention_has_its_own_operator_from_opset_23(tmp_path: Path) -> None:
    report = export_onnx(capture(Attend(), heads()), tmp_path / "model.onnx", opset=23)
    assert report.opset == 23
    assert report.max_error < 1e-5
    assert [n.op_type for n in onnx.load(str(tmp_path / "model.onnx")).graph.node] == ["Attention"]


def test_an_rms_norm_becomes_a_division(tmp_path: Path) -> None:
    report, ops = exported(nn.RMSNorm(16, eps=1e-5), (torch.randn(3, 16),), tmp_path)
    assert report.max_error < 5e-6
    assert (ops["Div"], ops["Reciprocal"]) == (1, 0)


class Pooled(nn.Module):
    """Pools to one pixel, and to four."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.adaptive_avg_pool2d(x, 1), torch.minimum(x, x.flip(1)).amax(1)


def test_global_pooling(tmp_path: Path) -> None:
    report, ops = exported(Pooled(), (torch.randn(2, 3, 8, 8),), tmp_path)
    assert report.max_error < 5e-6
    assert ops["GlobalAveragePool"] == 1


def test_other_pooling_goes_through_torchs_decomposition(tmp_path: Path) -> None:
    report, _ = exported(nn.AdaptiveAvgPool2d(2), (torch.randn(2, 3, 8, 8),), tmp_path)
    assert report.max_error < 5e-6
