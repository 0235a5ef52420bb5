"""Which modules are found, what may be done to them, and why others are left out."""

from __future__ import annotations

import pytest

from fxpress.passes.modules.finding import Part, find_modules, give_own_tables

from ... import attention_models
from ...tiny import fresh_program

F, Q, V = Part.FEED_FORWARD, Part.QUERY_KEY, Part.VALUE_OUTPUT


@pytest.mark.parametrize(("name", "mixed"), [("llama", False), ("gpt2", True), ("vit", True)])
def test_every_layer_has_three(name: str, mixed: bool) -> None:
    program = fresh_program(name)
    give_own_tables(program, "test")
    found = find_modules(program, tuple(Part))
    assert sorted(m.part.value for m in found.modules) == sorted([p.value for p in Part] * 2)
    assert {m.mixed for m in found.modules if m.part is Q} == {mixed}
    assert all(m.mixed and m.own for m in found.modules if m.part is V)
    assert not found.skips


def test_shared_tables_are_one_width_for_all_layers() -> None:
    found = find_modules(fresh_program("llama"), (Q,))
    assert len(found.modules) == 1
    assert not found.modules[0].own


def test_reasons() -> None:
    vision = find_modules(attention_models.program("vision"), tuple(Part))
    assert [m.part for m in vision.modules] == [F, F]
    assert all("expected 1" in s.why for s in vision.skips)
    program = attention_models.program("qk_norm")
    give_own_tables(program, "test")
    assert all("normalises" in s.why for s in find_modules(program, (Q,)).skips)
