"""Convolutions without biases, and such whose groups sum channels: the operators in the file, and the values against torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from fxpress.codegen.onnx_target import OnnxReport, export_onnx
from fxpress.ir.capture import capture
from fxpress.passes.base import parse_pass
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline


def exported(model: nn.Module, x: Tensor, folder: Path, *specs: str) -> tuple[OnnxReport, list[onnx.NodeProto]]:
    program = run_pipeline(capture(model.eval(), (x,)), [parse_pass(s) for s in specs], Context()).program
    report = export_onnx(program, folder / "model.onnx")
    return report, list(onnx.load(str(folder / "model.onnx")).graph.node)


def groups(nodes: list[onnx.NodeProto]) -> list[int]:
    return [next((a.i for a in n.attribute if a.name == "group"), 1) for n in nodes if n.op_type == "Conv"]


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d])
def test_a_convolution_without_bias_is_one_node(tmp_path: Path, conv: Any) -> None:
    report, nodes = exported(conv(8, 8, 3, bias=False), torch.randn(2, 8, *[9] * (1 if conv is nn.Conv1d else 2)), tmp_path)
    assert report.max_error < 1e-5
    assert [len(n.input) for n in nodes] == [2]


def test_a_bias_of_zeros_that_is_stored_stays(tmp_path: Path) -> None:
    conv = nn.Conv2d(8, 8, 3)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    assert [len(n.input) for n in exported(conv, torch.randn(2, 8, 9, 9), tmp_path)[1]] == [3]


@pytest.mark.parametrize(
    ("conv", "terms"),
    [
        (nn.Conv2d(12, 24, 3, padding=1), 2),
        (nn.Conv2d(12, 24, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2), bias=False), 3),
        (nn.Conv3d(12, 24, 3), 2),
        (nn.Conv2d(24, 48, 5, padding=2, groups=2), 4),
        (nn.Conv2d(24, 24, 7, padding=3, groups=24), 2),
    ],
    ids=["plain", "strided", "3d", "groups", "depthwise"],
)
def test_terms_become_branches(tmp_path: Path, conv: nn.Conv2d | nn.Conv3d, terms: int) -> None:
    report, nodes = exported(conv, torch.randn(2, conv.in_channels, *[11] * (conv.weight.dim() - 2)), tmp_path, f"oneway_conv{{terms={terms}}}")
    assert report.max_error < 1e-5
    assert Counter(n.op_type for n in nodes)["Add"] == terms - 1
    assert all(g in (1, 2, 24, 48) for g in groups(nodes))
    assert sum(len(n.input) > 2 for n in nodes if n.op_type == "Conv") == (conv.bias is not None)


class Between(nn.Module):
    """A convolution whose groups sum three channels, behind `first` and `middle`."""

    def __init__(self, first: nn.Module, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = first, middle, nn.Conv2d(24, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize(
    ("first", "middle"),
    [(nn.Conv2d(6, 24, 1), nn.ReLU()), (nn.Identity(), nn.Identity()), (nn.Conv2d(24, 24, 3, groups=12), nn.Identity())],
    ids=["not linear between", "no convolution before", "channels do not divide"],
)
def test_what_cannot_be_split_stays(tmp_path: Path, first: nn.Module, middle: nn.Module) -> None:
    x = torch.randn(2, 6 if isinstance(first, nn.Conv2d) and first.in_channels == 6 else 24, 9, 9)
    report, nodes = exported(Between(first, middle), x, tmp_path)
    assert report.max_error < 1e-5
    assert groups(nodes)[-1] == 8
    assert "Add" not in [n.op_type for n in nodes]


def test_biases_before_go_with_their_branches(tmp_path: Path) -> None:
    report, nodes = exported(Between(nn.Conv2d(6, 24, 1), nn.Conv2d(24, 24, 3, groups=24)), torch.randn(2, 6, 9, 9), tmp_path)
    assert report.max_error < 1e-5
    assert Counter(n.op_type for n in nodes) == {"Conv": 9, "Add": 2}


class Twice(nn.Module):
    """The channels that the groups sum are also an output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(6, 24, 1), nn.Conv2d(24, 8, 3, groups=8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.first(x)
        return made, self.last(made)


def test_channels_that_others_read_stay_together(tmp_path: Path) -> None:
    report, nodes = exported(Twice(), torch.randn(2, 6, 9, 9), tmp_path)
    assert report.max_error < 1e-5
    assert len(nodes) == 2
