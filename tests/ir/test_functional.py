"""Traced graphs made functional without a second trace: the same graph, sites, sizes and values as with one, and that one where it is needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.ir import capture as capturing
from fxpress.ir.functional import functional
from fxpress.ir.nodes import op_name
from fxpress.ir.program import Program

from ..tiny import tiny


def both(model: nn.Module, inputs: object, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[Program, Program]:
    """Captured the short way and the long one."""
    short = capturing.capture(model, inputs, **options)
    monkeypatch.setattr(capturing, "functional", lambda _: None)
    return short, capturing.capture(model, inputs, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "conv"])
def test_it_is_the_graph_that_a_second_trace_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    short, long = both(model.model, model.example_inputs, monkeypatch, dynamic_shapes=model.dynamic_shapes)
    assert [s.name for s in short.sites()] == [s.name for s in long.sites()] and short.inputs.dynamic == long.inputs.dynamic
    operators = [[op_name(n) for n in p.graph.nodes] for p in (short, long)]
    assert operators[0] == operators[1]
    pairs = zip(*(pytree.tree_leaves(p.run_examples()) for p in (short, long)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


class Moves(nn.Module):
    """Casts that copy and that do not, reshapes of whole and of turned memory."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        turned = x.transpose(0, 1)
        return (
            x.to(torch.float32) * 2,
            x.to(torch.float64) * 2,
            turned.reshape(-1) + 1,
            turned.contiguous().reshape(6, -1) + torch.dropout(x, 0.5, False).reshape(6, -1),
        )


def test_casts_and_reshapes_copy_where_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(24.0).view(4, 6)
    short, long = both(Moves(), (x,), monkeypatch)
    names = [op_name(n) for n in short.graph.nodes]
    assert names.count("aten._to_copy") == 1 and names.count("aten.clone") == 3 and names.count("aten.view") == 2 and names.count("aten._unsafe_view") == 1
    for got, expected in zip(short.run(x), long.run(x), strict=True):
        assert torch.equal(got, expected) and got.dtype == expected.dtype


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        return y


def test_what_writes_is_traced_again() -> None:
    exported = torch.export.export(Writes(), (torch.ones(3),))
    assert functional(exported) is None
    program = capturing.capture(Writes(), (torch.ones(3),))
    assert "aten.add_" not in " ".join(op_name(n) for n in program.graph.nodes) and torch.equal(program.run(torch.ones(3)), torch.full((3,), 3.0))


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(x, 0.5, True)


def test_dropout_that_drops_is_taken_apart_by_the_second_trace() -> None:
    exported = torch.export.export(Drops().eval(), (torch.ones(3),))
    assert "aten.dropout" in [op_name(n) for n in exported.graph.nodes] and functional(exported) is None
