"""Dense weights in narrow float types are stored as such."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from fxpress.codegen.onnx_target import export_onnx
from fxpress.ir.capture import capture
from fxpress.ir.formats.dense import Dense, FloatType
from tests.checks import compress


class Net(nn.Module):
    """Embedding, linear with a bias, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.conv = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Conv1d(16, 4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.mix(self.embed(ids)).transpose(1, 2))


@pytest.mark.parametrize("storage", [FloatType.FLOAT16, FloatType.BFLOAT16, FloatType.SAME])
def test_narrow_storage(tmp_path: Path, storage: FloatType) -> None:
    program = capture(Net().eval(), (torch.randint(20, (2, 8)),))
    for site in program.sites():
        compress(program, site, Dense(storage=storage))
    report = export_onnx(program, tmp_path / "model.onnx")
    assert report.max_error < 5e-6
    embed, mix, conv = report.lowering.sites
    width = 4 if storage is FloatType.SAME else 2
    assert (embed.nbytes, mix.nbytes, conv.nbytes) == (20 * 16 * width, 16 * 16 * width, 4 * 16 * 3 * 4)
    assert "no narrow form for conv1d sites" in conv.why
    kinds = {t.name: t.data_type for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    assert kinds["embed.weight_values"] == getattr(onnx.TensorProto, "FLOAT" if storage is FloatType.SAME else storage.name)
