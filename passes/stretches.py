"""A program cut at some of its nodes and run stretch by stretch over many calls, holding only the values that later stretches read.

What crosses a cut is whatever is read behind it: a residual stream, and with it masks, rotary tables or the memory of a cross attention. Weights can be
replaced call by call, and gradients flow through one stretch at a time, so that memory is that of one stretch and of the crossing values of all calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import PassError
from ..ir.nodes import get_tensor
from ..ir.ops import decode_once
from ..ir.program import Program
from .context import Call

Values = dict[fx.Node, Any]


class Stretches:
    """`program` cut behind the nodes named in `ends`, which come in graph order; what follows the last one is never run.

    All calls stand before stretch `index`. The program's tensors are shared and never written; `tensors` holds those that take their places.
    """

    def __init__(self, program: Program, calls: Sequence[Call], ends: Sequence[str]) -> None:
        self._module, self._ends = program.graph_module, _named(program, ends)
        self.stretches = _cut(program, self._ends)
        self._done = [_last_readers(stretch) for stretch in self.stretches]
        self.tensors: dict[str, Tensor] = {}
        self.index = 0
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        self._last = {source: i for i, stretch in enumerate(self.stretches) for n in stretch for source in n.all_input_nodes}
        self._values: list[Values] = [
            {n: v for n, v in zip(placeholders, program.inputs.flatten(*call), strict=True) if self._last.get(n, -1) >= 0} for call in calls
        ]

    def advance(self) -> list[Tensor]:
        """Run the stretch the calls stand before, without gradients, and go behind it; returns the values of its end, one a call."""
        found = []
        with torch.no_grad(), decode_once():
            for number, values in enumerate(self._values):
                made = self._run(values, self.tensors)
                found.append((values | made)[self._ends[self.index]])
                self._values[number] = {n: v for n, v in (values | made).items() if self._last.get(n, -1) > self.index}
        self.index += 1
        return found

    def end(self, call: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """The value at the end of the stretch for one call, with `tensors` in place; gradients flow where the caller's mode lets them."""
        value = self._run(self._values[call], self.tensors | dict(tensors))[self._ends[self.index]]
        assert isinstance(value, Tensor)
        return value

    def _run(self, entering: Values, tensors: Mapping[str, Tensor]) -> Values:
        """The values of the stretch that are still needed behind it, and of its end."""
        stretch, values = self.stretches[self.index], dict(entering)

        def load(node: fx.Node) -> Any:
            if node.op != "get_attr":
                return values[node]
            name = str(node.target)
            held = tensors[name] if name in tensors else get_tensor(self._module, name)
            return held if name in tensors or not held.requires_grad else held.detach()  # `decode_once` knows payloads by identity

        for node, done in zip(stretch, self._done[self.index], strict=True):
            values[node] = node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))  # type: ignore[operator]
            for source in done:
                if self._last.get(source, -1) <= self.index and source is not self._ends[self.index]:
                    values.pop(source, None)
        return {n: v for n, v in values.items() if n not in entering}


def _named(program: Program, names: Sequence[str]) -> list[fx.Node]:
    nodes = {n.name: n for n in program.graph.nodes}
    missing = [n for n in names if n not in nodes]
    if missing:
        raise PassError(f"the program has no node {missing[0]} to be cut at; it was made before the pass that removed it")
    return [nodes[n] for n in names]


def _cut(program: Program, ends: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Operators in graph order, a stretch for every end."""
    out: list[list[fx.Node]] = [[]]
    for node in program.graph.nodes:
        if len(out) > len(ends):
            break
        if node.op == "call_function":
            out[-1].append(node)
        if node is ends[len(out) - 1]:
            out.append([])
    if len(out) != len(ends) + 1:
        raise PassError(f"{ends[len(out) - 1].name} does not come behind {ends[len(out) - 2].name if len(out) > 1 else 'the inputs'} in the graph")
    return out[: len(ends)]


def _last_readers(stretch: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Per node of the stretch the values that no later node of it reads."""
    last = {source: i for i, n in enumerate(stretch) for source in (*n.all_input_nodes, n)}
    out: list[list[fx.Node]] = [[] for _ in stretch]
    for source, place in last.items():
        out[place].append(source)
    return out
