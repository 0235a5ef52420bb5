"""Values of single nodes: what they need and no more, from what is given in the middle, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir import evaluation
from fxpress.ir.evaluation import value_of
from fxpress.ir.program import Program


class Net(nn.Module):
    """`relu(x) w + exp(x)`: two ways to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.weight + torch.exp(x)


def _program() -> Program:
    return fxpress.capture(Net().eval(), (torch.randn(2, 3),))


def test_values_from_inputs_and_from_the_middle() -> None:
    program, x = _program(), torch.randn(2, 3)
    nodes = {n.name: n for n in program.graph.nodes}
    product, entry = nodes["mul"], next(n for n in program.graph.nodes if n.op == "placeholder")
    weight = program.graph_module.get_parameter("weight")
    assert torch.equal(value_of(program, product, {entry: x}.get), x.relu() * weight)
    assert torch.equal(value_of(program, product, {nodes["relu"]: x}.get), x * weight)  # the input is not needed then
    assert value_of(program, product, {product: x}.get) is x


def test_what_is_not_known_or_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program()
    nodes = {n.name: n for n in program.graph.nodes}
    with pytest.raises(LookupError, match="x"):
        value_of(program, nodes["mul"], lambda _: None)
    monkeypatch.setattr(evaluation, "MOST_NODES", 2)
    with pytest.raises(LookupError):
        value_of(program, nodes["add"], {next(iter(nodes.values())): torch.ones(2, 3)}.get)
