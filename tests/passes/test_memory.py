"""Memory: valid for the same tensors only."""

from __future__ import annotations

from fxpress.ir.edit import Editor
from fxpress.passes.memory import Memory

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
