"""Caches in 8 bits: within half a step of the float ones, the same logits piece by piece, in files, narrowed by later passes; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpress
from fxpress.codegen.onnx_target.export import export_onnx
from fxpress.ir.errors import PassError
from fxpress.ir.int8_caches import grown_caches
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.runtime.decoding import Decoder, OnnxDecoder, ProgramDecoder

from ..runtime.test_causal_lm import FAMILIES, batch, captured, in_parts
from ..tiny import fresh_program, tokens

CALIBRATION = [{**batch(2, 16), "input_ids": tokens(2, 16, seed=i)} for i in range(4)]


def quantized(name: str, recipe: Any = "quantize_cache") -> fxpress.Result:
    return fxpress.optimize(captured(name), recipe, calibration=CALIBRATION)


def scales(program: Program) -> list[Tensor]:
    return [get_tensor(program.graph_module, str(c.scale.target)) for c in grown_caches(program) if c.scale is not None]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_held_is_within_half_a_step_of_the_float_cache(name: str) -> None:
    result = quantized(name)
    program = result.program
    program.verify()
    here, there = (p.run(**CALIBRATION[0])["present"][0] for p in (program, captured(name)))  # the first layer sees the same inputs
    for kind, scale in zip(("key", "value"), scales(program), strict=False):
        assert here[kind].dtype is torch.int8 and scale.shape == (1, there[kind].shape[1], 1, there[kind].shape[3])
        assert ((here[kind] * scale - there[kind]).abs() <= 0.5001 * scale).all()
        assert int(here[kind].abs().max()) <= 127
    assert "4 caches hold" in result.reports[0].notes[0]
    facts = result.reports[0].taken[0].facts
    assert facts["token_bytes_before"] == 4 * facts["token_bytes_after"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_in_pieces_is_the_text(name: str) -> None:
    program, call = quantized(name).program, batch(2, 12, padding=3)
    whole = in_parts(program.run, call)
    torch.testing.assert_close(in_parts(program.run, call, 5, 6), whole, rtol=1e-4, atol=1e-4)
    dense = in_parts(captured(name).run, call)
    assert (whole - dense).abs().max() < 0.2 * dense.abs().max()


@pytest.mark.parametrize("portable", [False, True])
def test_files_hold_bytes_too(portable: bool, tmp_path: Path) -> None:
    program, ids = quantized("llama").program, tokens(1, 12)
    report = export_onnx(program, tmp_path / "model.onnx", portable=portable)
    assert report.max_error < 1e-4 and report.caches_in_place is not portable
    decoder = OnnxDecoder(tmp_path / "model.onnx", longest=16)
    assert {i.type for i in decoder._caches.values()} == {"tensor(int8)"}
    both: list[Decoder] = [decoder, ProgramDecoder(program)]
    for low, high in ((0, 5), (5, 6), (6, 12)):
        got, expected = (d(ids[:, low:high]) for d in both)
        assert (got - expected).abs().max() < 1e-4


def test_later_passes_narrow_the_scales_with_the_heads(tmp_path: Path) -> None:
    result = quantized("llama", ["quantize_cache", "prune_structured{ratio=0.5,roles=[kv_group]}"])
    program, call = result.program, batch(2, 9)
    assert {s.shape[1] for s in scales(program)} == {v.shape[1] for v in program.inputs.cached} == {1}
    torch.testing.assert_close(in_parts(program.run, call, 4), in_parts(program.run, call), rtol=1e-4, atol=1e-4)
    result.save(tmp_path / "artifact")
    torch.testing.assert_close(fxpress.load(tmp_path / "artifact").program.run(**call)["logits"], program.run(**call)["logits"])


def test_only_and_skip_and_what_is_refused() -> None:
    result = quantized("gpt2", "quantize_cache{only=['*_value']}")
    assert [v.dtype for v in result.program.inputs.cached] == [torch.float32, torch.int8] * 2
    assert len(result.reports[0].skipped) == 2
    torch.testing.assert_close(in_parts(result.program.run, batch(2, 9), 4), in_parts(result.program.run, batch(2, 9)), rtol=1e-4, atol=1e-4)
    with pytest.raises(PassError, match=r"the program has no caches; capture the model with fxpress.capture_causal_lm"):
        fxpress.optimize(fresh_program("llama"), "quantize_cache", calibration=[batch(2, 8)])
    with pytest.raises(PassError, match="it is in 8 bits already"):
        fxpress.optimize(quantized("llama").program, "quantize_cache", calibration=CALIBRATION)
