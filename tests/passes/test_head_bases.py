"""Changes of basis inside heads leave the outputs as they are, in every layout."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.edit import Editor
from fxpress.ir.program import Program
from fxpress.passes.head_bases import change_scores, change_values, order_channels
from fxpress.passes.modules.finding import Part, find_modules, give_own_tables

from .. import attention_models
from ..masking import difference, double, outputs
from ..tiny import fresh_program, seeded

LAYOUTS = ["llama", "gpt2", "opt", "bert", "vit", "llama_eager", "one_key_head", "fused_groups", "cross"]


def program(name: str) -> Program:
    plain = name in ("one_key_head", "fused_groups", "cross")
    return attention_models.program(name) if plain else double(fresh_program(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_stay(name: str) -> None:
    one = program(name)
    before, generator, parts = outputs(one), seeded(5), set()
    give_own_tables(one, "test")
    modules = [m for m in find_modules(one, tuple(Part)).modules if m.heads is not None]
    with Editor(one, "test") as editor:
        for module in modules:
            heads, size = module.heads, module.axis.size
            assert heads is not None
            maps = torch.randn(heads.count, size, size, generator=generator, dtype=torch.float64)
            if module.part is Part.VALUE_OUTPUT:
                change_values(editor, heads, module.axis, maps, torch.linalg.inv(maps), "test")
            elif module.mixed:
                change_scores(editor, heads, module.axis, maps, torch.linalg.inv(maps).transpose(1, 2), "test")
            else:
                order = torch.stack([torch.randperm(size, generator=generator) for _ in range(heads.count)])
                order_channels(editor, heads, module.axis, order, "test")
            parts.add((module.part, module.mixed))
    assert (Part.VALUE_OUTPUT, True) in parts and len(parts) == 2
    assert difference(outputs(one), before) < 1e-9
