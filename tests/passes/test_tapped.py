"""Runs with replaced weights and further outputs: bit-equal to the program, gradients to the given tensors only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxpress.ir.edit import Editor
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors
from fxpress.passes.tapped import Tapped, hidden_nodes

from ..checks import assert_same
from ..tiny import tiny

ADDS = {"mlp": 0, "conv": 0, "embedding": 0, "llama": 4, "vit": 4, "resnet": 2, "convnext": 2}


@pytest.mark.parametrize("name", ADDS)
def test_taps_leave_the_outputs_bit_equal(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    taps = hidden_nodes(program, captured(name))
    assert len(taps) == ADDS[name]
    call = (program.inputs.args, program.inputs.kwargs)
    with torch.no_grad():
        reply = Tapped(program, taps)(call)
    assert_same(reply.outputs, program.run_examples())
    assert len(reply.hidden) == len(taps)
    values: dict[str, torch.Tensor] = {}

    class Spy(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> torch.Tensor:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Spy(program.graph_module).run(*program.inputs.leaves, enable_io_processing=False)
    assert_same(list(reply.hidden), [values[t] for t in taps])


def test_other_sizes_and_structured_outputs(captured: Callable[[str], Program]) -> None:
    other = tiny("llama").other
    assert other is not None
    with torch.no_grad():
        assert_same(Tapped(captured("llama"))(other).outputs, captured("llama").run_inputs(other))


def test_gradients_reach_the_given_tensors_and_nothing_else(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    for parameter in program.graph_module.parameters():  # as of a model that is being trained
        parameter.requires_grad_()
    tapped = Tapped(program)
    before = {n: t.clone() for n, t in named_tensors(program.graph_module)}
    given = {"up.weight": before["up.weight"].detach().mul(2).requires_grad_()}
    call = (program.inputs.args, program.inputs.kwargs)
    tapped(call, given).outputs.sum().backward()
    assert given["up.weight"].grad is not None
    assert all(t.grad is None and torch.equal(t, before[n]) for n, t in named_tensors(program.graph_module))
    for parameter in program.graph_module.parameters():
        parameter.requires_grad_(False)
    assert not torch.equal(tapped(call).outputs, tapped(call, given).outputs)
    assert_same(tapped(call).outputs, program.run_examples())


def test_hidden_nodes_need_equal_names_in_both(captured: Callable[[str], Program]) -> None:
    student, teacher = captured("resnet"), captured("resnet")
    first = hidden_nodes(student, teacher)[0]
    node = next(n for n in student.graph.nodes if n.name == first)
    with Editor(student, "test") as editor:
        editor.bypass(node, node.all_input_nodes[0], "dropped")
    assert hidden_nodes(student, teacher) == hidden_nodes(teacher, teacher)[1:]
