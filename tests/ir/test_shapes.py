"""Values of programs that were read from files, constants among their inputs included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxpress
import fxpress.ir.shapes
from fxpress.ir.axes import analyze_axes
from fxpress.ir.capture import capture
from fxpress.ir.nodes import node_type
from fxpress.ir.program import Program
from fxpress.ir.shapes import propagate

from ..masking import divided, free, resized
from ..tiny import Mlp, fresh_program, randn


class Switched(nn.Module):
    """An `Mlp` behind a flag that capture fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        """`[..., 12] -> [..., 6]`."""
        return self.inner(x) if flag else -self.inner(x)


def test_a_loaded_program_with_a_constant_input_has_shapes_again(tmp_path: Path) -> None:
    program = capture(Switched().eval(), {"x": randn(3, 12), "flag": True})
    fxpress.optimize(program, "prune_magnitude{sparsity=0.5}").save(tmp_path / "artifact")
    loaded = fxpress.load(tmp_path / "artifact").program
    assert [c.size for c in analyze_axes(loaded).classes] == [c.size for c in analyze_axes(program).classes]
    small = fxpress.optimize(loaded, "prune_structured{ratio=0.5,importance=l2}").program
    assert small.parameters < program.parameters
    assert torch.isfinite(small.run_examples()).all()


def values(program: Program) -> list[tuple[str, str, object]]:
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    return [(n.name, str(node_type(n)), [str(s) for s in n.meta["val"].stride()] if isinstance(n.meta["val"], Tensor) else None) for n in nodes]


@pytest.mark.parametrize("model", ["conv", "conv1d", "unet", "embedding", "grouped"])
def test_values_that_stand_are_those_that_computing_all_anew_gives(model: str) -> None:
    program = fresh_program(model)
    for one in free(analyze_axes(program)):
        small = resized(program, {one.name: divided(one)[0].tolist()})
        after = values(small)
        propagate(small)
        assert values(small) == after


def test_only_what_follows_from_a_change_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    call = fxpress.ir.shapes._call

    def counted(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        made.append(node.name)
        return call(node, known)

    monkeypatch.setattr(fxpress.ir.shapes, "_call", counted)
    resized(fresh_program("unet"), {"up.weight[1]": [0, 2]})
    assert made == ["conv_transpose2d", "cat", "conv2d_2"], "the last of these gives what it gave before"
