"""Run a program's graph with tensors of one's own and with some values inside the graph as further outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from ..ir.nodes import node_type
from ..ir.program import Program
from ..ir.structure import find_structure
from ..ir.weights import named_tensors, set_tensor
from .context import Call


@dataclass(frozen=True)
class Reply:
    """What a run gave: the outputs flattened and as the model returns them, and the tapped values."""

    leaves: Sequence[Any]
    outputs: Any
    hidden: Sequence[Tensor]


class Tapped:
    """A program's graph, its weights replaceable call by call, that also returns the values of the nodes named in `taps`.

    The clone shares its tensors with the program, and no call writes into them.
    """

    def __init__(self, program: Program, taps: Sequence[str] = ()) -> None:
        clone = program.clone()
        graph, self._inputs = clone.graph, clone.inputs
        nodes = {n.name: n for n in graph.nodes}
        flat, self._spec = output_form(clone)
        self._count = len(flat)
        for name, tensor in list(named_tensors(clone.graph_module)):  # a captured model's parameters may ask for gradients of their own
            set_tensor(clone.graph_module, name, tensor.detach(), parameter=isinstance(tensor, nn.Parameter))
        graph.set_codegen(CodeGen())
        graph.output_node().args = ((*flat, *(nodes[t] for t in taps)),)
        self._module = clone.graph_module
        self._module.recompile()

    def __call__(self, call: Call, tensors: Mapping[str, Tensor] | None = None) -> Reply:
        """Run one call, with `tensors` in the place of the program's own of these names; gradients flow where the caller's mode lets them."""
        leaves = tuple(self._inputs.flatten(*call))
        values = torch.func.functional_call(self._module, dict(tensors or {}), leaves)
        outputs = values[: self._count]
        return Reply(outputs, pytree.tree_unflatten(list(outputs), self._spec), values[self._count :])


def output_form(program: Program) -> tuple[Sequence[Any], pytree.TreeSpec]:
    """The arguments of the output node, flat, and the structure in which the model returns them (an exported graph's output node holds them flat)."""
    info = getattr(program.graph._codegen, "pytree_info", None)
    held = program.graph.output_node().args[0]
    if info is None:
        return pytree.tree_leaves(held), pytree.tree_structure(held)
    assert isinstance(held, (tuple, list))
    return held, info.out_spec


def hidden_nodes(student: Program, teacher: Program) -> list[str]:
    """Names of nodes that mean the same in both programs: additions to a residual stream, of equal name and type."""
    there = _residual_adds(teacher)
    return [name for name, kind in _residual_adds(student).items() if there.get(name) == kind]


def _residual_adds(program: Program) -> dict[str, str]:
    """Name and type of every addition that writes a residual stream, in graph order."""
    adds = {n for residual in find_structure(program).residuals for n in residual.adds}
    return {n.name: str(node_type(n)) for n in program.graph.nodes if n in adds}
