"""Smaller models as Hugging Face folders: loaded by the architecture's own class, equal outputs, and what no config can say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

import fxpress
from fxpress.ir.errors import LowerError

from ..masking import difference
from ..passes.nesting.nets import nested
from ..tiny import fresh_program, tiny


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "opt", "vit"))])
def test_a_slice_is_loaded_by_its_own_class(name: str, tmp_path: Path) -> None:
    result = fxpress.optimize(nested(name)[0], "slice{ratio=0.5}")
    kind = type(tiny(name).model)
    result.save_pretrained(tmp_path / "small", tiny(name).model)
    model, problems = kind.from_pretrained(tmp_path / "small", output_loading_info=True)  # type: ignore[attr-defined]
    assert not problems["missing_keys"] and not problems["mismatched_keys"]
    args, kwargs = tiny(name).call
    with torch.no_grad():
        got = [t for t in pytree.tree_leaves(model.eval()(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    wanted = [t for t in pytree.tree_leaves(result.program.run_examples()) if isinstance(t, torch.Tensor)]
    assert difference(got[: len(wanted)], wanted) < 1e-4
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny(name).model.parameters())


def test_what_a_config_cannot_say(tmp_path: Path) -> None:
    model = tiny("llama").model
    with pytest.raises(LowerError, match=r"layers that had 88 units now have \[24, 64\], and a config holds one width"):
        fxpress.optimize(nested("llama")[0], "slice{widths=[24,64]}").save_pretrained(tmp_path / "a", model)
    with pytest.raises(LowerError, match=r"holds affine.*which no Hugging Face class stores"):
        fxpress.optimize(fresh_program("llama"), "quantize_rtn{bits=4,group_size=8}").save_pretrained(tmp_path / "b", model)
    with pytest.raises(LowerError, match="expected a Hugging Face model with a config, got Mlp"):
        fxpress.optimize(fresh_program("mlp"), "prune_magnitude{sparsity=0.5}").save_pretrained(tmp_path / "c", tiny("mlp").model)
    assert not list(tmp_path.iterdir())
