"""Learned tables in ONNX files: every width, table type and kind of site, exact as written, fused where the report says so, small on disk."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from fxpress.codegen.onnx_target import export_onnx
from fxpress.codegen.onnx_target.codes import bit_fields

from .sides import Tied, compressed, errors, shared

ENTRIES = (2, 3, 4, 7, 8, 16, 29, 64, 100, 256)
OPTIONS = ("", ",rows_per_table=3", ",rows_per_table=none", ",scale_dtype=float32", ",table=float16", ",table=float32,rows_per_table=4")
SPECS = tuple(f"lut{{entries={entries}{option}}}" for entries in ENTRIES for option in OPTIONS)


@pytest.mark.parametrize("columns", [100, 128, 200])
def test_linears(tmp_path: Path, columns: int) -> None:
    report, found = errors(lambda: nn.Linear(columns, 10), torch.randn(3, columns), SPECS, tmp_path)
    assert not {spec: exact for spec, (exact, _) in found.items() if exact > 1e-6}
    assert not {spec: fused for spec, (_, fused) in found.items() if fused > 3e-2}, "MatMulNBits rounds activations to 8 bits; more is wrong weights"
    assert [s.fused for s in report.lowering.sites] == ["float16" not in spec and "table=float32" not in spec for spec in SPECS]
    assert report.opset == 21


def test_embeddings(tmp_path: Path) -> None:
    report, found = errors(lambda: nn.Embedding(20, 50), torch.randint(20, (2, 3)), SPECS, tmp_path)
    assert not {spec: both for spec, both in found.items() if max(both) > 1e-6}
    assert all(s.form.startswith("Gather[") for s in report.lowering.sites)


def test_ids_of_32_bits(tmp_path: Path) -> None:
    _, found = errors(lambda: nn.Embedding(20, 50), torch.randint(20, (5,)).int(), SPECS[:6], tmp_path)
    assert not {spec: both for spec, both in found.items() if max(both) > 1e-6}


def test_convolutions(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Conv2d(16, 6, (2, 4), groups=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2))

    report, found = errors(make, torch.randn(2, 16, 9, 9), SPECS, tmp_path)
    assert not {spec: both for spec, both in found.items() if max(both) > 1e-6}
    assert all(s.form.endswith("Conv") for s in report.lowering.sites)


def test_unbatched_signals(tmp_path: Path) -> None:
    program = compressed(nn.Conv1d(8, 5, 3, padding=1), torch.randn(8, 12), ["lut{entries=8}"])
    assert export_onnx(program, tmp_path / "model.onnx").max_error < 5e-6


@pytest.mark.parametrize(("entries", "bits"), [(2, 1), (4, 2), (8, 3), (16, 4), (32, 5), (64, 6), (128, 7), (256, 8)])
def test_files_hold_no_unused_bits(tmp_path: Path, entries: int, bits: int) -> None:
    program = compressed(nn.Linear(1024, 256, bias=False), torch.randn(3, 1024), [f"lut{{entries={entries}}}"])
    report = export_onnx(program, tmp_path / "model.onnx")
    stored = 256 * 1024 * bits // 8 + 256 * entries + 256 * 2
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert sum(len(t.raw_data) for t in model.graph.initializer) == report.lowering.nbytes == report.lowering.sites[0].nbytes
    assert stored <= report.lowering.nbytes <= stored + 200, "the payload, and constants of a few bytes"
    assert report.file_bytes <= 1.02 * report.lowering.nbytes + 4096
    assert (report.fused, report.max_error < 5e-6, report.fused_error < 3e-2) == (1, True, True)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_fields(bits: int) -> None:
    assert sum(bit_fields(bits)) == bits
    assert bit_fields(7) == (4, 2, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 32)])
def test_a_linear_before_relu_is_fused_too(tmp_path: Path, bias: bool, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(32, 160, bias=bias), nn.ReLU(), nn.Linear(160, 8, bias=bias), nn.ReLU6(), nn.Linear(8, 4))
    assert export_onnx(compressed(model, torch.randn(shape), ["lut{entries=16}"] * 3), tmp_path / "model.onnx").fused == 3


@pytest.mark.parametrize("spec", ["lut{entries=16}", "lut{entries=8,rows_per_table=4}"])
def test_tied_codes_are_stored_once_and_fused(tmp_path: Path, spec: str) -> None:
    program = shared(Tied(), torch.randint(40, (2, 3)), spec)
    report = export_onnx(program, tmp_path / "model.onnx")
    assert (report.fused, report.max_error < 5e-6) == (1, True)
    assert report.lowering.nbytes < program.nbytes + 300


def test_a_weight_with_several_readers_is_stored_once(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64, bias=False)
    program = shared(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 64), "lut{entries=16}")
    report = export_onnx(program, tmp_path / "model.onnx")
    assert [s.nbytes > 0 for s in report.lowering.sites] == [True, False]
    assert "one reader only" in report.lowering.sites[0].why
    assert report.max_error < 1e-5


def test_float16_models(tmp_path: Path) -> None:
    specs = ["lut{entries=16}", "lut{entries=16,scale_dtype=float32}", "lut{entries=8,table=float16}"]
    model = nn.Sequential(nn.Linear(64, 160), nn.SiLU(), nn.Linear(160, 32), nn.SiLU(), nn.Linear(32, 8)).half()
    report = export_onnx(compressed(model, torch.randn(3, 64).half(), specs), tmp_path / "model.onnx")
    assert [s.fused for s in report.lowering.sites] == [True, False, False]
    assert "float32 scales in a float16 model" in report.lowering.sites[1].why
    assert "float16 entries are on no 8-bit grid" in report.lowering.sites[2].why
    assert report.max_error < 5e-3


def test_what_onnx_runtime_would_not_expand_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.codegen.onnx_target.lut.FOLDED_BYTES", 4 * 64 * 64 - 1)
    report = export_onnx(compressed(nn.Linear(64, 64), torch.randn(3, 64), ["lut{entries=16}"]), tmp_path / "model.onnx")
    assert "more than the 1 GiB that ONNX Runtime computes at load" in report.lowering.sites[0].why
    assert report.max_error < 5e-6
