"""Attention over caches in standard operators: which files have it, from which opset on, and that what is masked stays finite."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

import fxpress
from fxpress.codegen.onnx_target.cached_attention import masked
from fxpress.codegen.onnx_target.export import export_onnx
from fxpress.ir.errors import LowerError

from ...runtime.test_serving import captured


@pytest.mark.parametrize(("opset", "attentions"), [(None, 2), (21, 0), (24, 2)])
def test_portable_files_have_one_attention_a_layer_from_opset_23_on(opset: int | None, attentions: int, tmp_path: Path) -> None:
    report = export_onnx(captured(), tmp_path / "model.onnx", portable=True, opset=opset)
    model = onnx.load(tmp_path / "model.onnx")
    kinds = Counter(n.op_type for n in model.graph.node)
    assert report.opset == (opset or 23) and [o.domain for o in model.opset_import] == [""] and report.max_error < 1e-5
    assert kinds["Attention"] == attentions and kinds["RotaryEmbedding"] == 2 * attentions and kinds["Softmax"] == 2 - attentions
    assert not report.caches_in_place


def test_parts_of_a_fused_product(tmp_path: Path) -> None:
    """Query, key and value of one product come through a sequence, whose shapes onnx does not infer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    program = fxpress.capture_causal_lm(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=32)).eval())
    report = export_onnx(program, tmp_path / "model.onnx", portable=True)
    assert report.max_error < 1e-5 and not report.notes


def test_later_opsets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LowerError, match="opset=26: portable attention is written up to opset 25"):
        export_onnx(captured(), tmp_path / "model.onnx", portable=True, opset=26)


def test_what_is_masked_stays_finite_in_every_type() -> None:
    for kind in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16):
        assert np.isfinite(kind.numpy().type(masked(kind))) and masked(kind) < -5e4
