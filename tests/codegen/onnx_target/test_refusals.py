"""A failed export leaves nothing behind and says why."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.codegen.onnx_target import export_onnx
from fxpress.ir.errors import ArtifactError, ExportError, LowerError


@pytest.fixture(scope="module")
def result() -> fxpress.Result:
    """A small compressed linear."""
    torch.manual_seed(0)
    return fxpress.optimize(nn.Linear(64, 64).eval(), "quantize_rtn{bits=4,group_size=32}", example_inputs=(torch.randn(2, 64),))


def test_a_parity_that_fails_writes_nothing(result: fxpress.Result, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="error"):
        export_onnx(result.program, tmp_path / "m.onnx", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(result: fxpress.Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        result.export_onnx(tmp_path / "file" / "m.onnx")


def test_a_disk_that_fills_up_half_way_leaves_the_old_file(result: fxpress.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    from fxpress.codegen.onnx_target import export

    def full(model: Any, scratch: Path, external: bool) -> None:
        scratch.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save", full)
    with pytest.raises(ArtifactError, match="No space left"):
        result.export_onnx(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_low_opset_and_bfloat16_are_refused(result: fxpress.Result, tmp_path: Path) -> None:
    with pytest.raises(LowerError, match=r"opset >= 21"):
        result.export_onnx(tmp_path / "m.onnx", opset=17)
    program = fxpress.capture(nn.Linear(8, 8).eval().bfloat16(), (torch.randn(2, 8, dtype=torch.bfloat16),))
    with pytest.raises(LowerError, match="bfloat16"):
        export_onnx(program, tmp_path / "m.onnx")


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x @ x.transpose(-1, -2))

    program = fxpress.capture(Odd(), (torch.randn(2, 4, 4),))
    with pytest.raises(LowerError, match=r"torch\.onnx cannot translate"):
        export_onnx(program, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
