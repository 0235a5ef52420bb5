"""Attached models in folders: the same outputs, ties, sizes and `generate()` after a round trip, compressed as they were; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.errors import ArtifactError, LowerError
from fxpress.ir.weights import unique_bytes
from fxpress.runtime.attached_files import MODULES, TENSORS
from fxpress.runtime.compressed_modules import CompressedWeight

from ..checks import assert_same
from ..tiny import fresh_program, tiny, tokens

RECIPES = {
    "llama_tied": ["quantize_rtn{bits=4,group_size=8,kinds=[linear,embedding]}"],
    "llama": ["prune_magnitude{sparsity=0.5}", "store_sparse"],
    "gpt2": ["quantize_rtn{bits=3,group_size=8}"],
    "vit": ["quantize_rtn{bits=8}"],
    "resnet": ["fold_affine", "quantize_rtn{bits=8}"],
}


def attached(name: str, recipe: list[str]) -> nn.Module:
    return fxpress.optimize(fresh_program(name), recipe).attach(tiny(name).model)


def outputs(model: nn.Module, name: str) -> list[torch.Tensor]:
    args, kwargs = tiny(name).call
    with torch.no_grad():
        return [v for v in model(*args, **kwargs).values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", RECIPES)
def test_it_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = attached(name, RECIPES[name])
    assert fxpress.save_pretrained(model, tmp_path / "small") == tmp_path / "small"
    again = fxpress.from_pretrained(tmp_path / "small")
    assert type(again) is type(model) and not again.training
    held = [[p for p, m in one.named_modules() if isinstance(m, CompressedWeight)] for one in (model, again)]
    assert held[0] == held[1] and held[0]
    assert_same(outputs(again, name), outputs(model, name))
    assert unique_bytes(again) <= unique_bytes(model) and not any(p.requires_grad for p in again.parameters())
    assert (tmp_path / "small" / TENSORS).stat().st_size < 1.1 * unique_bytes(model) + 20_000


def test_it_generates(tmp_path: Path) -> None:
    model = attached("llama_tied", RECIPES["llama_tied"])
    fxpress.save_pretrained(model, tmp_path / "small")
    again, ids = fxpress.from_pretrained(tmp_path / "small"), tokens(1, 5)
    written = [m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False) for m in (model, again)]  # type: ignore[operator]
    assert torch.equal(*written) and written[0].shape[1] > 5


def test_pruned_sizes_come_back(tmp_path: Path) -> None:
    result = fxpress.optimize(fresh_program("llama"), "prune_structured{ratio=0.3,roles=[ffn]}", calibration=[tiny("llama").call[1]])
    model = result.attach(tiny("llama").model)
    fxpress.save_pretrained(model, tmp_path / "small")
    again = fxpress.from_pretrained(tmp_path / "small")
    assert_same(outputs(again, "llama"), outputs(model, "llama"))
    linears = [m for m in again.modules() if isinstance(m, nn.Linear)]
    assert all((m.out_features, m.in_features) == tuple(m.weight.shape) for m in linears)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LowerError, match=r"expected a model of a class of transformers, got torch\.nn"):
        fxpress.save_pretrained(nn.Linear(2, 2), tmp_path / "no")
    with pytest.raises(ArtifactError, match=r"config.json, fxpress.safetensors, fxpress.json is missing"):
        fxpress.from_pretrained(tmp_path)
    fxpress.save_pretrained(attached("gpt2", RECIPES["gpt2"]), tmp_path / "small")
    record = json.loads((tmp_path / "small" / MODULES).read_text())
    for change, message in (({"version": 7}, "this fxpress reads 1"), ({"modules": {}}, "tensors that the folder lacks")):
        (tmp_path / "small" / MODULES).write_text(json.dumps(record | change))
        with pytest.raises(ArtifactError, match=message):
            fxpress.from_pretrained(tmp_path / "small")
    (tmp_path / "small" / MODULES).write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        fxpress.from_pretrained(tmp_path / "small")
