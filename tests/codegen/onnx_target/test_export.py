"""Exported files: size, signature, tied weights, external data, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxpress.codegen.onnx_target import OnnxReport, export_onnx
from fxpress.codegen.onnx_target.export import _check_size
from fxpress.codegen.onnx_target.extras import require
from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.errors import ExportError, LowerError, MissingExtraError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.program import Program
from fxpress.ir.site_calls import why_not_compressible
from fxpress.ir.sites import SiteKind
from fxpress.runtime.artifact import load, save

from ... import torchlib
from ...grouping import some_slow

BLOCKS = "fxpress.codegen.onnx_target.blocks"


def compressed(program: Program, bits: int = 4) -> Program:
    """Linears and convs at `bits` (groups of 16 where they fit), embeddings at 8 bits."""
    with Editor(program, "test") as editor:
        for site in program.sites():
            group_size = 16 if site.kind is SiteKind.LINEAR and site.columns >= 16 else None
            fmt = Affine(bits=8) if site.kind is SiteKind.EMBEDDING else Affine(bits=bits, group_size=group_size)
            if why_not_compressible(site) is None:
                editor.compress(site, fmt, fmt.encode(site.matrix()), "test")
    return program


def dims(values: Any) -> list[list[int | str]]:
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]


@pytest.fixture(scope="module")
def llama(captured: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxReport, Path]:
    """A tied llama with grouped heads, 4-bit linears (lm_head included) and an 8-bit embedding."""
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    return export_onnx(compressed(captured("llama_tied")), path), path


def test_llama_is_fused_and_right(llama: tuple[OnnxReport, Path]) -> None:
    report, path = llama
    assert report.fused == 15 == sum(s.fused for s in report.lowering.sites), "7 linears a layer and the tied lm_head"
    assert report.max_error < 1e-5
    assert report.fused_error < 0.2
    assert [c.bound for c in report.checks] == [1e-4, 1e-4, 0.25, 0.25], "float16 scales do not loosen the bound of a float32 model"
    assert [(c.mode.value, dict(c.sizes)) for c in report.checks] == [
        (mode, sizes) for mode in ("exact", "default") for sizes in ({"batch": 2, "length": 8}, {"batch": 3, "length": 9})
    ]
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    json.dumps(report.to_dict())


def test_llama_signature(llama: tuple[OnnxReport, Path]) -> None:
    graph = onnx.load(str(llama[1])).graph
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in graph.output] == ["logits"]
    assert dims(graph.input) == [["batch", "length"]] * 2
    assert dims(graph.output) == [["batch", "length", 96]]


def test_llama_file_is_its_weights(llama: tuple[OnnxReport, Path]) -> None:
    report, path = llama
    model = onnx.load(str(path))
    stored = {t.name: len(t.raw_data) for t in model.graph.initializer}
    assert sum(stored.values()) == report.lowering.nbytes
    assert report.file_bytes == path.stat().st_size < report.lowering.nbytes + 150 * len(model.graph.node) + 4096
    assert not [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.raw_data) > 1024]
    assert {o.domain for o in model.opset_import} == {""}
    assert not any(n.domain or n.metadata_props or n.doc_string for n in model.graph.node)


def test_dense_tied_weights_are_stored_once(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = captured("llama_tied")
    report = export_onnx(program, tmp_path / "dense.onnx")
    model = onnx.load(str(tmp_path / "dense.onnx"))
    assert [list(t.dims) for t in model.graph.initializer].count([96, 32]) == 1
    assert [32, 96] not in [list(t.dims) for t in model.graph.initializer], "a transposed copy"
    assert report.lowering.nbytes <= program.nbytes
    rows = {s.site: s for s in report.lowering.sites}
    assert rows["lm_head"].nbytes == 0
    assert "shares the tensor of model.embed_tokens" in rows["lm_head"].why
    assert report.max_error < 1e-5


@pytest.mark.parametrize("name", some_slow(["conv", "conv1d", "gpt2", "vit", "opt"], "opt"))
def test_other_models(captured: Callable[[str], Program], name: str, tmp_path: Path) -> None:
    report = export_onnx(compressed(captured(name)), tmp_path / "model.onnx")
    assert report.max_error < 1e-5
    assert report.fused == sum(s.fused for s in report.lowering.sites) > 0
    assert not report.notes


def test_external_data(tmp_path: Path) -> None:
    program = compressed(capture(nn.Linear(256, 128).eval(), (torch.randn(2, 256),)))
    report = export_onnx(program, tmp_path / "big.onnx", external_data=True)
    graph, data = tmp_path / "big.onnx", tmp_path / "big.onnx.data"
    assert {p.name for p in tmp_path.iterdir()} == {"big.onnx", "big.onnx.data"}
    assert report.external_data
    assert report.file_bytes == graph.stat().st_size + data.stat().st_size
    assert data.stat().st_size > 256 * 128 // 2 > graph.stat().st_size
    assert onnxruntime.InferenceSession(str(graph)).run(None, {"input": torch.randn(1 + 1, 256).numpy()})[0].shape == (2, 128)


def test_a_loaded_program_exports_alike(captured: Callable[[str], Program], llama: tuple[OnnxReport, Path], tmp_path: Path) -> None:
    program = compressed(captured("llama_tied"))
    loaded = load(save(tmp_path / "artifact", program)).program
    report = export_onnx(loaded, tmp_path / "model.onnx")
    assert report.lowering == llama[0].lowering
    assert report.fused == 15
    assert (tmp_path / "model.onnx").read_bytes() == llama[1].read_bytes(), "exports are deterministic"


class Outputs(nn.Module):
    """Outputs that are an input, one value twice, None, nested, integer and boolean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Any]:
        h = self.layer(x) * scale
        return {"x": x, "a": h, "b": h, "none": None, "nested": (h + 1, [h * 2]), "index": h.argmax(-1), "flag": h > 0}


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    program = compressed(capture(Outputs().eval(), {"x": torch.randn(2, 32), "scale": 3.0}))
    export_onnx(program, tmp_path / "model.onnx")
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert [i.name for i in graph.input] == ["x"]
    assert [o.name for o in graph.output] == ["x_out", "a", "b", "nested_0", "nested_1_0", "index", "flag"]


def test_a_format_without_a_fast_path_is_decoded(captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.codegen.onnx_target.lowering.fast_path", lambda *_: None)
    program = compressed(captured("mlp"))
    report = export_onnx(program, tmp_path / "model.onnx")
    assert all(s.form == "aten.linear on float32" and "no fast path codegen/onnx_target/affine.py" in s.why for s in report.lowering.sites)
    assert report.lowering.nbytes == captured("mlp").nbytes
    assert report.fused == 0


def test_a_tied_weight_that_is_decoded_is_stored_once(captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.codegen.onnx_target.lowering.fast_path", lambda *_: None)
    program = captured("embedding")
    embed, head = (s for s in program.sites() if s.tied)
    payload = Affine(bits=4).encode(embed.matrix())
    with Editor(program, "test") as editor:
        for site in (embed, head):
            editor.compress(site, Affine(bits=4), payload, "test")
    report = export_onnx(program, tmp_path / "model.onnx")
    assert report.lowering.nbytes == captured("embedding").nbytes


def test_unchecked_exports_say_so(captured: Callable[[str], Program], tmp_path: Path) -> None:
    report = export_onnx(compressed(captured("mlp")), tmp_path / "model.onnx", check=False)
    assert report.checks == ()
    assert "not checked" in report.notes[0]
    assert report.max_error != report.max_error  # NaN


@pytest.mark.parametrize(("bound", "mode"), [("tolerance", "exact"), ("fused_tolerance", "default")])
def test_a_failed_check_leaves_nothing(captured: Callable[[str], Program], tmp_path: Path, bound: str, mode: str) -> None:
    with pytest.raises(ExportError, match=rf"output 'output' \[4, 6\] at {{'batch': 4}}: .* in the {mode} run, expected at most 1e-12; .*{bound}="):
        export_onnx(compressed(captured("mlp")), tmp_path / "model.onnx", **{bound: 1e-12})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_failed_check_keeps_the_old_file(captured: Callable[[str], Program], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("before")
    with pytest.raises(ExportError):
        export_onnx(compressed(captured("mlp")), tmp_path / "model.onnx", tolerance=0.0)
    assert (tmp_path / "model.onnx").read_text() == "before"


def test_wrong_scales_are_caught(captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpress.codegen.onnx_target import blocks

    right = blocks._cast_scale
    monkeypatch.setattr(f"{BLOCKS}._cast_scale", lambda slot, scale: slot.writer.op("Neg", right(slot, scale)))
    with pytest.raises(ExportError, match="does not compute what the program computes"):
        export_onnx(compressed(captured("mlp")), tmp_path / "model.onnx")


def test_wasted_bytes_are_caught() -> None:
    _check_size(1_010_000, 1_000_000, 10)
    with pytest.raises(ExportError, match=r"takes 1040000 bytes, but its weights are 1000000 .* stored twice"):
        _check_size(1_040_000, 1_000_000, 10)


def test_refusals(captured: Callable[[str], Program], tmp_path: Path) -> None:
    with pytest.raises(LowerError, match=r"opset=17: .* needs opset >= 21"):
        export_onnx(captured("mlp"), tmp_path / "model.onnx", opset=17)
    program = capture(nn.Linear(4, 4).bfloat16().eval(), (torch.randn(2, 4).bfloat16(),))
    with pytest.raises(LowerError, match=r"computes in bfloat16.*capture model.float\(\)"):
        export_onnx(program, tmp_path / "model.onnx")
    with pytest.raises(MissingExtraError, match=r"exporting needs the package 'no_such_package'; install it with: pip install 'fxpress\[onnx\]'"):
        require("no_such_package", "exporting")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", some_slow(["llama_eager", "bert", "resnet"], "llama_eager", "bert"))
def test_torchs_own_decomposition_is_not_needed(captured: Callable[[str], Program], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpress.codegen.onnx_target import skeleton

    calls = []
    right = skeleton._export

    def counted(*given: Any) -> Any:
        calls.append(name)
        return right(*given)

    monkeypatch.setattr(skeleton, "_export", counted)
    skeleton.export_skeleton(compressed(captured(name)), 21)
    assert calls == [name], "a second call decomposes, which takes two thirds of torch.onnx's time"


class Mystery(nn.Module):
    """Ends in an operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


def test_an_untranslatable_operator_is_named(tmp_path: Path) -> None:
    with pytest.raises(LowerError, match=r"cannot translate the program to opset 21: .*eigh"):
        export_onnx(capture(Mystery(), (torch.eye(3),)), tmp_path / "model.onnx")


def test_the_exporter_is_silent(captured: Callable[[str], Program], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torchlib.forget()
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addHandler(handler)
    try:
        export_onnx(compressed(captured("mlp")), tmp_path / "model.onnx")
    finally:
        logger.removeHandler(handler)
    assert not heard, "torch.onnx names every torchvision operator it cannot find"
    assert not recwarn.list
