"""How an exported file is compared with the program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.codegen.onnx_target import export_onnx
from fxpress.codegen.onnx_target.check import _other_sizes, relative_errors
from fxpress.ir.capture import capture
from fxpress.ir.program import Program


def test_relative_errors() -> None:
    expected = np.array([1.0, -4.0, np.inf, np.nan], dtype=np.float32)
    assert relative_errors(expected, expected) == (0.0, 0.0)
    largest, rms = relative_errors(np.array([1.0, -3.0, np.inf, np.nan], dtype=np.float32), expected)
    assert largest == pytest.approx(0.25)
    assert rms == pytest.approx(1 / np.sqrt(17))
    for wrong in ([1.0, -4.0, np.inf, 0.0], [1.0, -4.0, -np.inf, np.nan], [1.0, np.nan, np.inf, np.nan]):
        assert relative_errors(np.array(wrong, dtype=np.float32), expected)[0] == np.inf
    assert relative_errors(expected[:2], expected)[0] == np.inf
    assert relative_errors(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4])) == (0.25, 0.25)
    held = np.arange(100, dtype=np.int8)
    near, far, many = held.copy(), held.copy(), held.copy()
    near[:2], far[0], many[:3] = near[:2] + 1, 50, many[:3] + 1
    assert [relative_errors(x, held)[0] for x in (near, far, many)] == [0.0, 0.01, 0.03], "the last rounding may differ, here and there"
    assert relative_errors(held + 1, held)[0] == 1 and relative_errors(held + 1, held)[1] == pytest.approx(1 / np.sqrt(np.mean(np.arange(100.0) ** 2)))
    assert relative_errors(np.full(3, 1e-3), np.zeros(3))[0] > 1, "an output that should be zero"
    assert relative_errors(np.zeros((0, 2)), np.zeros((0, 2))) == (0.0, 0.0)


def test_other_sizes_are_legal(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    longer, shorter = _other_sizes(program)
    assert [tuple(x.shape) for x in longer] == [(3, 9), (3, 9)]
    assert [tuple(x.shape) for x in shorter] == [(1, 7), (1, 7)]
    assert set(longer[0].flatten().tolist()) == set(program.inputs.leaves[0].flatten().tolist()), "only ids that the model knows"


class Positions(nn.Module):
    """Fails beyond 8 positions, which its dynamic shapes do not say."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.cumsum(torch.ones_like(x[..., 0], dtype=torch.int64), 1) - 1)


def test_a_size_at_which_the_program_fails_is_passed_over(tmp_path: Path) -> None:
    program = capture(Positions().eval(), (torch.randn(2, 8, 4),), dynamic_shapes=({1: Dim("length", min=2, max=64)},))
    report = export_onnx(program, tmp_path / "model.onnx")
    assert [dict(c.sizes) for c in report.checks] == [{"length": 8}, {"length": 7}] * 2
    assert not report.notes


def test_a_single_legal_size_is_said(tmp_path: Path) -> None:
    program = capture(Positions().eval(), (torch.randn(2, 8, 4),), dynamic_shapes=({1: Dim("length", min=8, max=64)},))
    report = export_onnx(program, tmp_path / "model.onnx")
    assert len(report.checks) == 2
    assert "checked at the example sizes only; the program itself fails at others ({'length': 9}: " in report.notes[0]
