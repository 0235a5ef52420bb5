"""Gradients of the loss at the outputs of weight sites, one call at a time, with memory for one stretch of the graph.

Going back through a whole graph needs every value of the way forward at once. Here only the values that cross from one stretch of nodes to the next are
kept; each stretch is run again, with gradients, when its turn comes (Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174).
Weights get no gradients of their own: what a pass wants follows from a site's input and the gradient of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.errors import CalibrationError
from ..ir.nodes import get_tensor
from ..ir.program import Program
from ..ir.sites import WeightSite
from .context import Context
from .examples import Example
from .memory import release
from .structured.loss import example_loss, task_criterion
from .tapped import Reply, output_form

STRETCH = 48  # operators of one stretch
Values = dict[fx.Node, Any]
Visit = Callable[[WeightSite, Tensor, Tensor], None]


class Gradients:
    """The way back through `program` for the `sites` in it."""

    def __init__(self, program: Program, sites: Sequence[WeightSite], ctx: Context) -> None:
        self._program, self._ctx = program, ctx
        self._sites = {s.node: s for s in sites}
        self._criterion = task_criterion(program, ctx)
        self._stretches = _stretches([n for n in program.graph.nodes if n.op == "call_function"])
        self._last_use = _last_uses(self._stretches, program.graph.output_node())

    def visit(self, visit: Visit, label: str) -> None:
        """`visit(site, input, slope)` for every calibration call, in order, and every site in the graph's reverse order.

        `slope` is the gradient, at the site's output, of the task's loss (next tokens of a language model), else of a random projection of the outputs.
        """
        generator = self._ctx.generator()
        for example in self._ctx.track([Example(c) for c in self._ctx.calibration], label):
            self._one(example, visit, generator)
            release()

    def _one(self, example: Example, visit: Visit, generator: torch.Generator) -> None:
        values, crossing = self._forward(example)
        slopes = self._loss_slopes(example, values, generator)
        values.clear()  # the logits, which the last stretch makes again
        for stretch in reversed(self._stretches):
            self._back(stretch, crossing.pop(), slopes, visit)

    def _forward(self, example: Example) -> tuple[Values, list[Values]]:
        """Values that the output reads, and for every stretch those that enter it."""
        leaves = self._program.inputs.flatten(*example.call)
        values: Values = dict(zip((n for n in self._program.graph.nodes if n.op == "placeholder"), leaves, strict=True))
        crossing = []
        with torch.no_grad():
            for index, stretch in enumerate(self._stretches):
                read = {s for n in stretch for s in n.all_input_nodes}
                crossing.append({n: v for n, v in values.items() if n in read})
                values |= {n: v for n, v in self._run(stretch, dict(values)).items() if self._last_use.get(n, -1) > index}
                values = {n: v for n, v in values.items() if self._last_use.get(n, -1) > index}
        return values, crossing

    def _run(self, stretch: Sequence[fx.Node], values: Values, tapped: bool = False) -> Values:
        """Run a stretch on `values`; returns what its nodes gave. `tapped`: site outputs always ask for gradients."""
        module, made = self._program.graph_module, {}

        def load(node: fx.Node) -> Any:
            return get_tensor(module, str(node.target)).detach() if node.op == "get_attr" else values[node]

        for node in stretch:
            value = node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))  # type: ignore[operator]
            if tapped and node in self._sites and not value.requires_grad:
                value = value.detach().requires_grad_()
            values[node] = made[node] = value
        return made

    def _loss_slopes(self, example: Example, values: Values, generator: torch.Generator) -> Values:
        """Gradient of the loss at every float value that the output reads."""
        output = self._program.graph.output_node()
        outer = {n: _leaf(v) for n, v in values.items()}
        held, form = output_form(self._program)
        flat = [outer.get(v, v) if isinstance(v, fx.Node) else v for v in held]
        with torch.enable_grad():
            reply = Reply(flat, pytree.tree_unflatten(flat, form), ())
            loss = example_loss(self._criterion, self._program, example, reply, generator)
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(f"the loss is {float(loss)} on a calibration batch, so no gradient can be taken; check the batch, or use fp32 weights")
        asked = [n for n in output.all_input_nodes if isinstance(outer.get(n), Tensor) and outer[n].requires_grad]
        found = torch.autograd.grad(loss, [outer[n] for n in asked], allow_unused=True)
        return {n: g for n, g in zip(asked, found, strict=True) if g is not None}

    def _back(self, stretch: Sequence[fx.Node], entering: Values, slopes: Values, visit: Visit) -> None:
        """Run a stretch again and carry `slopes` from its results to what entered it."""
        ends = [n for n in stretch if n in slopes]
        if not ends:
            return
        leaves = {n: _leaf(v) for n, v in entering.items()}
        with torch.enable_grad():
            made = self._run(stretch, dict(leaves), tapped=True)
        sites = [n for n in stretch if n in self._sites]
        asked = [n for n in leaves if _asks(leaves[n])]
        results = {n: slopes.pop(n) for n in ends}
        inputs = [*(leaves[n] for n in asked), *(made[n] for n in sites)]
        wanted = [n for n in ends if _asks(made[n])]
        if not wanted or not inputs:
            return
        found = torch.autograd.grad([made[n] for n in wanted], inputs, [results[n] for n in wanted], allow_unused=True)
        for node, slope in zip(asked, found, strict=False):
            if slope is not None:
                slopes[node] = slopes[node] + slope if node in slopes else slope
        for node, slope in zip(sites, found[len(asked) :], strict=True):
            if slope is not None:
                source = self._sites[node].data
                visit(self._sites[node], (made[source] if source in made else leaves[source]).detach(), slope)


def _stretches(operators: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """At least `STRETCH` operators each; none ends between an operator with several results and the nodes that take them out."""
    place = {n: i for i, n in enumerate(operators)}
    out: list[list[fx.Node]] = [[]]
    open_until = 0
    for i, node in enumerate(operators):
        out[-1].append(node)
        if isinstance(node.meta.get("val"), (tuple, list)):
            open_until = max([open_until, *(place[u] for u in node.users if u in place)])
        if len(out[-1]) >= STRETCH and i >= open_until and i + 1 < len(operators):
            out.append([])
    return out


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _asks(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _last_uses(stretches: Sequence[Sequence[fx.Node]], output: fx.Node) -> dict[fx.Node, int]:
    """The last stretch that reads each value; the output comes after all."""
    last = {source: index for index, stretch in enumerate(stretches) for n in stretch for source in n.all_input_nodes}
    return last | dict.fromkeys(output.all_input_nodes, len(stretches))
