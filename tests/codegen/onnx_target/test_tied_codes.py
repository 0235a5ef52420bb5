"""A head tied to its embedding goes on sharing its codes: in programs, artefacts, and files of language models, where nothing is stored twice."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch

import fxpress
from fxpress.codegen.onnx_target.export import export_onnx
from fxpress.ir.program import Program

from ...runtime.test_causal_lm import batch

BOTH = "kinds=[linear,embedding]"


@cache
def tied() -> Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=48, tie_word_embeddings=True, initializer_range=0.3)).eval()
    return fxpress.capture_causal_lm(model)


def sharing(program: Program) -> list[str]:
    return [s.name for s in program.sites() if s.tied]


def tables(path: Path) -> int:
    """Stored tensors as large as the table of 96 x 64 codes, in 4 or 8 bits."""
    return sum(t.dims[0] == 96 or t.dims[-1] == 96 for t in onnx.load(path).graph.initializer if len(t.dims) == 2 and min(t.dims) > 2 and "codes" in t.name)


@pytest.mark.parametrize("options", ["bits=4,group_size=32", "bits=4,group_size=32,symmetric=true", "bits=3,group_size=16", "bits=8,group_size=32"])
def test_equal_codes_are_one(options: str, tmp_path: Path) -> None:
    result = fxpress.optimize(tied(), f"quantize_rtn{{{options},{BOTH}}}")
    apart = fxpress.optimize(tied(), [f"quantize_rtn{{{options}}}", "quantize_rtn{bits=5,kinds=[embedding]}"]).program
    assert sharing(result.program) == ["model.embed_tokens", "lm_head"] and sharing(apart) == []
    assert result.program.nbytes < apart.nbytes - 2000 and not any("no longer shares" in n for n in result.reports[0].notes)
    result.save(tmp_path / "artifact")
    again = fxpress.load(tmp_path / "artifact").program
    assert sharing(again) == ["model.embed_tokens", "lm_head"]
    torch.testing.assert_close(again.run(**batch(2, 5))["logits"], result.program.run(**batch(2, 5))["logits"])
    report = export_onnx(result.program, tmp_path / "model.onnx")
    assert tables(tmp_path / "model.onnx") == 1 and report.max_error < 1e-5
    assert all("stored once" in s.why or "gathered" in s.why for s in report.lowering.sites if s.site in sharing(result.program))


def test_portable_files_hold_standard_operators_and_both_tables(tmp_path: Path) -> None:
    program = fxpress.optimize(tied(), f"quantize_rtn{{bits=4,group_size=32,{BOTH}}}").program
    export_onnx(program, tmp_path / "model.onnx", portable=True)
    assert tables(tmp_path / "model.onnx") == 2
    assert {n.domain for n in onnx.load(tmp_path / "model.onnx").graph.node} == {""}


def test_other_codes_stay_apart() -> None:
    apart = fxpress.optimize(tied(), ["quantize_rtn{bits=4,group_size=32}", "quantize_rtn{bits=4,group_size=16,kinds=[embedding]}"])
    assert sharing(apart.program) == [] and "lm_head: no longer shares its weight" in apart.reports[0].notes[-1]
    late = fxpress.optimize(tied(), ["quantize_rtn{bits=4,group_size=32}", "quantize_rtn{bits=4,group_size=32,kinds=[embedding]}"])
    assert sharing(late.program) == ["model.embed_tokens", "lm_head"], "two passes of the same options make one table, too"
