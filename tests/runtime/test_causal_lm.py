"""Language models with their cache: the same logits as without one whatever the lengths and the padding, under every pass, in files; and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir.errors import CaptureError
from fxpress.ir.program import Program
from fxpress.runtime.causal_lm import CACHE
from fxpress.runtime.measure import parity
from fxpress.runtime.onnx_session import open_session

from ..grouping import some_slow
from ..tiny import fresh_program, randn, tiny, tokens

FAMILIES = ("llama", "opt", "gpt2")


@cache
def captured(name: str) -> Program:
    return fxpress.capture_causal_lm(tiny(name).model)


def batch(rows: int, length: int, padding: int = 0) -> dict[str, Tensor]:
    """Tokens, the first row padded on the left."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :padding] = 0
    return {"input_ids": tokens(rows, length, seed=length), "attention_mask": mask}


def in_parts(run: Any, call: dict[str, Tensor], *cuts: int) -> Tensor:
    """Logits of a text given piece by piece, each with the cache of those before."""
    found: list[Tensor] = []
    given: dict[str, Any] = {}
    for low, high in zip((0, *cuts), (*cuts, call["input_ids"].shape[1]), strict=True):
        out = run(input_ids=call["input_ids"][:, low:high], attention_mask=call["attention_mask"][:, :high], **given)
        found, given = [*found, out["logits"]], {CACHE: out["present"]}
    return torch.cat(found, 1)


def own_logits(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    """The model's own, with the positions that transformers gives to padded text."""
    positions = (call["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**call, position_ids=positions, use_cache=False).logits


def real(call: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Without what stands at padding."""
    return logits[call["attention_mask"].bool()]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_model_s_own_at_every_length(name: str) -> None:
    program = captured(name)
    for call in (batch(1, 9), batch(4, 13, padding=3)):
        expected = own_logits(tiny(name).model, call)
        for cuts in ((), (6,), (5, 6, 7, 8)):
            torch.testing.assert_close(real(call, in_parts(program.run, call, *cuts)), real(call, expected), rtol=1e-5, atol=1e-5)


def test_the_model_stays_as_it_was() -> None:
    model = tiny("llama").model
    before = type(model), model.training, model.forward.__func__  # type: ignore[attr-defined]
    captured("llama")
    assert (type(model), model.training, model.forward.__func__) == before  # type: ignore[attr-defined]


def test_sites_have_the_names_that_the_model_gives() -> None:
    with_cache = [s.name for s in captured("llama").sites()]
    assert with_cache == [s.name for s in fresh_program("llama").sites()]


def test_caches_have_axes_of_their_own() -> None:
    inputs = captured("llama").inputs
    assert inputs.caches == (CACHE,) and len(inputs.cache_leaves) == 4
    assert inputs.dynamic[1][1].parts == ("new", "past") and inputs.dynamic[2][2].low == 0
    assert [tuple(v.shape) for v in inputs.cached] == [(2, 2, 3, 8)] * 4


@pytest.mark.parametrize("spec", ["quantize_gptq{bits=4,group_size=8}", "decompose_modules{ratio=0.7}", "prune_structured{ratio=0.5,roles=[kv_group,ffn]}"])
def test_passes_work_on_it_and_narrow_caches_with_the_model(spec: str, tmp_path: Path) -> None:
    result = fxpress.optimize(captured("llama"), spec, calibration=[batch(2, 16), batch(2, 12)])
    call = batch(2, 11, padding=2)
    whole = result.program.run(**call)["logits"]
    torch.testing.assert_close(real(call, in_parts(result.program.run, call, 6, 7)), real(call, whole), rtol=1e-4, atol=1e-5)
    assert result.original is not None and parity(result.original, result.program).max_rel_error < 2
    result.save(tmp_path / "saved")
    loaded = fxpress.load(tmp_path / "saved").program
    assert loaded.inputs.caches == (CACHE,)
    torch.testing.assert_close(in_parts(loaded.run, call, 6, 7), in_parts(result.program.run, call, 6, 7))
    narrow = [tuple(v.shape) for v in result.program.inputs.cached]
    assert (narrow != [(2, 2, 3, 8)] * 4) == ("quantize" not in spec)


def test_heads_leave_as_they_do_without_a_cache() -> None:
    small = fxpress.optimize(captured("llama"), "prune_structured{ratio=0.5,roles=[kv_group]}", calibration=[batch(2, 16)]).program
    same = fxpress.optimize(fresh_program("llama"), "prune_structured{ratio=0.5,roles=[kv_group]}", calibration=[batch(2, 16)]).program
    call = batch(2, 9)
    torch.testing.assert_close(in_parts(small.run, call, 5), same.run(**call)["logits"], rtol=1e-5, atol=1e-5)


def test_a_compressed_model_is_captured_with_its_payloads() -> None:
    """What a pipeline made of the plain program comes back through `attach`."""
    model = tiny("llama").model
    result = fxpress.optimize(model, "quantize_rtn{bits=4,group_size=8}", example_inputs=tiny("llama").example_inputs)
    again = fxpress.capture_causal_lm(result.attach(model))
    assert [s.format.to_spec() for s in again.sites()] == [s.format.to_spec() for s in result.program.sites()]
    call = batch(2, 10)
    torch.testing.assert_close(in_parts(again.run, call, 4), own_logits(result.attach(model), call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", some_slow(FAMILIES, "opt", "gpt2"))
def test_onnx_files_run_from_the_first_token_on(name: str, portable: bool, tmp_path: Path) -> None:
    program = captured(name)
    report = fxpress.optimize(program, []).export_onnx(tmp_path / "model.onnx", portable=portable)
    assert report.max_error < 1e-5
    session = open_session(tmp_path / "model.onnx")
    names = [o.name for o in session.get_outputs()]

    def run(**call: Any) -> dict[str, Any]:
        past = call.pop(CACHE, None) or program.inputs.completed(call)[CACHE]
        feeds = {k: v.numpy() for k, v in call.items()} | {f"{CACHE}.{i}.{k}": t.numpy() for i, layer in enumerate(past) for k, t in layer.items()}
        found = dict(zip(names, map(torch.from_numpy, session.run(None, feeds)), strict=True))
        return {"logits": found["logits"], "present": [{k: found[f"present.{i}.{k}"] for k in ("key", "value")} for i in range(len(past))]}

    call = batch(3, 8, padding=2)
    torch.testing.assert_close(real(call, in_parts(run, call, 5, 6, 7)), real(call, own_logits(tiny(name).model, call)), rtol=1e-4, atol=1e-5)


def test_what_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM, T5Config, T5ForConditionalGeneration

    with pytest.raises(CaptureError, match=r"expected a causal language model of transformers, got Linear; fxpress.capture takes any module"):
        fxpress.capture_causal_lm(nn.Linear(2, 2))
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.raises(CaptureError, match="layer 0 has a DynamicSlidingWindowLayer; only plain growing caches"):
        fxpress.capture_causal_lm(MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)))
    with pytest.raises(CaptureError, match="expected a causal language model of transformers, got T5"):
        fxpress.capture_causal_lm(T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)))
    with pytest.raises(ValueError, match="expected 0 positional and keywords"):
        captured("llama").inputs.flatten((), {"input_ids": randn(2, 2)})
