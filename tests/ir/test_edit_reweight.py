"""`Editor.reweight`: new values under all tied names, journalled at the node, shapes and types kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxpress.ir.edit import Editor
from fxpress.ir.errors import EditError
from fxpress.ir.journal import Action
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import alias_classes

from ..checks import assert_same


def test_reaches_every_tied_site_and_is_journalled(captured: Callable[[str], Program]) -> None:
    program = captured("embedding")
    before = program.clone()
    site = next(s for s in program.sites() if s.name == "embed")
    new = torch.full(site.shape, 0.5)
    with Editor(program, "test") as editor:
        editor.reweight(site.node, {site.tensors[0]: new}, "why", {"relative_change": 1.0}, site)
    assert all(torch.equal(s.matrix(), new) for s in program.sites() if s.name in ("embed", "head"))
    assert len(alias_classes(program.graph_module).of(site.tensors[0])) == len(alias_classes(before.graph_module).of(site.tensors[0]))
    (change,) = program.journal.changes
    assert change.action is Action.REWEIGHTED and change.facts == {"relative_change": 1.0}
    assert change.after is not None and change.after.module == "embed"
    assert not before.journal.changes
    assert_same(get_tensor(before.graph_module, site.tensors[0]), captured("embedding").sites()[0].matrix())


@pytest.mark.parametrize("wrong", [torch.zeros(3, 3), torch.zeros(24, 8, dtype=torch.float64)])
def test_refuses_another_shape_or_type(captured: Callable[[str], Program], wrong: torch.Tensor) -> None:
    program = captured("embedding")
    site = program.sites()[0]
    with pytest.raises(EditError, match=r"expected torch\.float32"):
        Editor(program, "test").reweight(site.node, {site.tensors[0]: wrong}, "why", {}, site)
