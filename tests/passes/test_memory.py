"""Memory: valid for the same tensors only."""

from __future__ import annotations

from pathlib import Path

import torch

from fxpress.ir.edit import Editor
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.memory import Memory, remembered

from ..tiny import fresh_program


def test_values_hold_for_the_same_tensors_only() -> None:
    program, memory = fresh_program("mlp"), Memory()
    assert memory.recall("a", program) is None
    assert memory.keep("a", program, 7) == 7
    assert memory.recall("a", program) == memory.recall("a", program.clone()) == 7
    assert memory.recall("b", program) is None
    changed = program.clone()
    with Editor(changed, "test") as editor:
        site = changed.sites()[0]
        editor.set_matrix(site, site.matrix().clone(), "the same values in another tensor")
    assert memory.recall("a", changed) is None


def test_a_checkpoint_folder_remembers_over_runs(tmp_path: Path) -> None:
    program, calls = fresh_program("mlp"), []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"a": torch.tensor([1.5])}

    for run in range(3):
        ctx = Context(checkpoint=Checkpoint(tmp_path, "mark"))
        for _ in range(2):
            assert remembered(ctx, "scores", ["a"], program, compute)["a"].tolist() == [1.5]
        assert ctx.checkpoint is not None
        assert ctx.checkpoint.reused == (run > 0)
    assert len(calls) == 1
    with Editor(program, "test") as editor:
        site = program.sites()[0]
        editor.set_matrix(site, site.matrix() * 2, "other weights")
    remembered(ctx, "scores", ["a"], program, compute)
    assert len(calls) == 2
