"""Sums of formats in ONNX files: the parts' forms, added; refusals that name the part."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from fxpress.codegen.onnx_target import export_onnx

from .sides import compressed, errors, shared

SPECS = (
    "composite{parts=['sparse_outliers{count=30}','lut{entries=8}']}",
    "composite{parts=['lut{entries=16}','sparse_outliers{count=200,values=float32}']}",
    "composite{parts=['sparse_outliers{count=30}','affine{bits=4,group_size=32}']}",
    "composite{parts=['affine{bits=2,group_size=32}','affine{bits=4,group_size=16}']}",
    "composite{parts=['lut{entries=4,table=float16}','lut{entries=4}','sparse_outliers{count=9}']}",
    "composite{parts=['sparse_outliers{count=30}','sparse_outliers{count=40}']}",
)
DENSE = "composite{parts=['lut{entries=4}','dense{storage=float16}']}"


@pytest.mark.parametrize("shape", [(3, 160), (2, 3, 160)])
def test_linears(tmp_path: Path, shape: tuple[int, ...]) -> None:
    report, found = errors(lambda: nn.Linear(160, 12), torch.randn(shape), (*SPECS, DENSE), tmp_path)
    assert not {spec: exact for spec, (exact, _) in found.items() if exact > 1e-6}
    assert not {spec: fused for spec, (_, fused) in found.items() if fused > 3e-2}
    assert [s.fused for s in report.lowering.sites] == [True, True, True, True, True, False, True]
    assert report.opset == 25, "2-bit integers ask for it"


def test_convolutions(tmp_path: Path) -> None:
    _, found = errors(lambda: nn.Conv2d(16, 6, (2, 4), groups=2, stride=(2, 1), padding=(1, 0)), torch.randn(2, 16, 9, 9), SPECS, tmp_path)
    assert not {spec: both for spec, both in found.items() if max(both) > 1e-6}


def test_embeddings(tmp_path: Path) -> None:
    specs = (SPECS[3], DENSE, "composite{parts=['lut{entries=4}','affine{bits=3}']}")
    _, found = errors(lambda: nn.Embedding(20, 50), torch.randint(20, (2, 3)), specs, tmp_path)
    assert not {spec: both for spec, both in found.items() if max(both) > 1e-6}


@pytest.mark.parametrize(
    ("model", "example", "spec", "reason"),
    [
        (nn.Embedding(20, 16), torch.randint(20, (2, 3)), SPECS[0], "part sparse_outliers: kept weights are stored in runs"),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9), DENSE, "part dense: no narrow form for conv1d sites"),
    ],
)
def test_refusals_name_the_part(tmp_path: Path, model: nn.Module, example: torch.Tensor, spec: str, reason: str) -> None:
    report = export_onnx(compressed(model, example, [spec]), tmp_path / "model.onnx")
    assert reason in report.lowering.sites[0].why


def test_files_hold_the_parts_and_the_weight_is_fused(tmp_path: Path) -> None:
    fmt = "composite{parts=['sparse_outliers{count=1200}','lut{entries=8}']}"
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    report = export_onnx(compressed(model, torch.randn(3, 512), [fmt, fmt]), tmp_path / "model.onnx")
    stored = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    assert sum(len(t.raw_data) for t in stored) == report.lowering.nbytes
    assert report.lowering.sites[0].nbytes < 512 * 512 * 3 / 8 + 512 * 10 + 1200 * 4 + 512 * 8
    assert report.file_bytes <= 1.02 * report.lowering.nbytes + 16384
    assert (report.fused, report.max_error < 5e-6, report.fused_error < 3e-2) == (2, True, True)


def test_several_readers_share_what_is_stored(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64, bias=False)
    program = shared(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 64), SPECS[0])
    report = export_onnx(program, tmp_path / "model.onnx")
    assert [s.nbytes > 0 for s in report.lowering.sites] == [True, False]
    assert "one reader only" in report.lowering.sites[0].why
    assert report.max_error < 1e-5


def test_float16_models(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 160), nn.SiLU(), nn.Linear(160, 8)).half()
    report = export_onnx(compressed(model, torch.randn(3, 64).half(), SPECS[:2]), tmp_path / "model.onnx")
    assert (report.fused, report.max_error < 5e-3) == (2, True)


def test_dynamic_batches(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", max=64)
    program = compressed(nn.Linear(64, 16), torch.randn(3, 64), SPECS[:1], dynamic_shapes=({0: batch},))
    assert len({tuple(c.sizes.values()) for c in export_onnx(program, tmp_path / "model.onnx").checks}) == 2
