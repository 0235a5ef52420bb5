"""What the journal says was changed: weights pruned, factors, norms of other sizes; not what was left alone, and not a site whose name only begins alike."""

from __future__ import annotations

import pytest

from fxpress.ir.journal import Action, Change, Journal, NodeRecord
from fxpress.passes.changed import Changed
from fxpress.passes.trainable import find_parts

from .healing_nets import compressed, tower


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("prune_magnitude{sparsity=0.5,only=[layers.1.up]}", ["layers.1.up"]),
        ("factorize_svd{ratio=0.5,metric=weight,only=[layers.1.up]}", ["layers.1.up.down", "layers.1.up.up"]),
        ("factorize_mpo{ratio=0.5,metric=weight,family=2,only=[layers.1.up]}", ["layers.1.up.inner", "layers.1.up.outer", "layers.1.up.bias"]),
        ("prune_structured{ratio=0.3,only=['layers.1.*'],compensation=off,importance=l2}", ["layers.1.up", "layers.1.down"]),
        ("quantize_rtn{bits=8,only=[layers.1.up]}", []),
    ],
)
def test_parts_that_passes_changed(spec: str, names: list[str]) -> None:
    program = compressed(tower(), spec)
    changed = Changed(program)
    assert [p.name for p in find_parts(program)[0] if changed.holds(p)] == names


def test_nothing_is_changed_in_a_fresh_program() -> None:
    assert not Changed(tower()).nodes


def test_a_name_that_only_begins_alike_is_no_factor() -> None:
    program = tower().clone()
    was = NodeRecord(name="gone", op="aten.linear", module="layers.1.u", parameters=4, format="dense")
    program.journal = Journal([Change(pass_spec="x", action=Action.REPLACED, why="", before=was, after=NodeRecord(name="other", op="aten.linear"))])
    changed = Changed(program)
    assert changed.nodes == {"gone", "other"} and not any(changed.holds(p) for p in find_parts(program)[0])
