"""Speculative decoding over one cache: the full model's text, in torch and in ONNX Runtime, from buffers that both models write; decoders that rewind."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import fxpress
from fxpress.codegen.onnx_target.export import export_onnx
from fxpress.ir.errors import CalibrationError, LowerError
from fxpress.ir.program import Program
from fxpress.runtime.causal_lm import last_logits
from fxpress.runtime.decoding import Decoder, OnnxDecoder, ProgramDecoder
from fxpress.runtime.elastic import Elastic
from fxpress.runtime.generation import generate
from fxpress.runtime.speculative import speculate_cached

from ..tiny import fresh_program, tokens
from .test_causal_lm import batch
from .test_serving import model

WIDTHS = (1.0, 0.5, 0.25)
LONGEST = 40


@cache
def nested() -> Program:
    calls = [{**batch(2, 8), "input_ids": tokens(2, 8, 64, seed=i)} for i in range(4)]
    return fxpress.optimize(fxpress.capture_causal_lm(model()), "nest{centre=true}", calibration=calls).program


def greedy(decoder: Decoder, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Token after token."""
    decoder.start()
    return torch.cat([ids, torch.tensor([list(generate(decoder, ids[0], most=count))])], 1)


@pytest.mark.parametrize("ahead", [1, 4])
def test_programs_share_the_full_model_s_cache(ahead: int) -> None:
    elastic, ids = Elastic(nested()), tokens(1, 6, 64)
    full = ProgramDecoder(elastic.program)
    plain = greedy(full, ids, 21)
    for width in WIDTHS:
        found = speculate_cached(full, ProgramDecoder(elastic.at(width)), ids, 21, ahead=ahead)
        assert torch.equal(found.ids, plain) and sum(found.accepted) + len(found.accepted) + 1 == 21
        if width == 1.0:
            assert set(found.accepted[:-1]) == {ahead} and found.tokens_per_run > 1


def test_onnx_files_share_buffers_and_weights(tmp_path: Path) -> None:
    elastic, ids = Elastic(nested()), tokens(1, 6, 64)
    elastic.export_onnx(tmp_path / "nested", widths=WIDTHS)
    full, half, quarter = (OnnxDecoder(tmp_path / "nested" / f"width-{i}.onnx", longest=LONGEST) for i in range(3))
    plain = greedy(full, ids, 21)
    assert torch.equal(plain, greedy(ProgramDecoder(elastic.program), ids, 21))
    for draft in (half, quarter):
        found = speculate_cached(full, draft, ids, 21, ahead=3)
        assert torch.equal(found.ids, plain)
        assert all(draft._held[n] is full._held[n] for n in full._held)


def test_rewinding_is_as_if_nothing_had_come(tmp_path: Path) -> None:
    program, ids = nested(), tokens(1, 12, 64)
    export_onnx(program, tmp_path / "place.onnx")
    export_onnx(program, tmp_path / "grow.onnx", portable=True)
    decoders: list[Decoder] = [ProgramDecoder(program), *(OnnxDecoder(tmp_path / n, longest=LONGEST) for n in ("place.onnx", "grow.onnx"))]
    for decoder in decoders:
        expected = decoder(ids)[:, 5:]
        decoder.rewind(3)
        decoder(tokens(1, 4, 64, seed=9))
        decoder.rewind(3)
        assert decoder.length == 3
        decoder(ids[:, 3:5])
        assert (decoder(ids[:, 5:]) - expected).abs().max() < 1e-4
        with pytest.raises(CalibrationError, match="cannot rewind to 13 tokens, 12 are held"):
            decoder.rewind(13)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(LowerError, match="has no caches"):
        ProgramDecoder(fresh_program("llama"))
    export_onnx(nested(), tmp_path / "model.onnx")
    one, other = (OnnxDecoder(tmp_path / "model.onnx", longest=n) for n in (LONGEST, 20))
    with pytest.raises(CalibrationError, match="cannot be shared"):
        one.follow(other)
    export_onnx(last_logits(nested()), tmp_path / "last.onnx")
    last = OnnxDecoder(tmp_path / "last.onnx", longest=LONGEST)
    with pytest.raises(CalibrationError, match=r"6 tokens went in and logits of 1 came out; save the model with all_logits=True"):
        speculate_cached(last, last, tokens(1, 6, 64), 4)
