"""Matrix product operators of two sites in a graph, and their composed form: the weight multiplied out of its cores, then one dense product.

Run as a chain, an operator of modes b = c = t does t times the arithmetic of a low-rank pair with as many weights, and balanced ones up to a hundred times
that of the dense weight. Composed, it costs the dense product and `chi` multiply-adds for each of its entries, once for all tokens. Both forms read the same
stored cores; the composed one is for training and scoring, where tokens are many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .edit import Editor
from .program import Program
from .shapes import ensure_values, take_place
from .sites import SiteKind, WeightSite

aten = torch.ops.aten
INNER, OUTER = ".inner", ".outer"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """`W[(a, c), (b, d)] = sum_r A[a, b, r] B[r, c, d]`, run from `x` to `last` with `inner` first; `second_first`: that is B."""

    x: fx.Node
    inner: WeightSite
    outer: WeightSite
    last: fx.Node
    modes: tuple[int, int, int, int]
    second_first: bool

    @property
    def name(self) -> str:
        """The site it was."""
        return self.inner.name.removesuffix(INNER)

    @property
    def bond(self) -> int:
        """The bond dimension chi."""
        a, b, c, d = self.modes
        return self.inner.parameters // (c * d if self.second_first else a * b)

    @property
    def columns(self) -> int:
        """Inputs of the weight, without what is padded."""
        return int(self.x.meta["val"].shape[-1])

    @property
    def rows(self) -> int:
        """Outputs of the weight, without what is cut off."""
        return int(self.last.meta["val"].shape[-1])

    @property
    def multiplications(self) -> int:
        """Multiply-adds a token, as a chain."""
        a, b, c, d = self.modes
        return self.inner.parameters * (b if self.second_first else d) + self.outer.parameters * (c if self.second_first else a)

    def composed_multiplications(self, tokens: float) -> float:
        """Multiply-adds a token, composed once for so many tokens."""
        a, b, c, d = self.modes
        return self.rows * self.columns + a * b * c * d * self.bond / tokens

    def cheaper_composed(self, tokens: float) -> bool:
        """Whether so many tokens pay for the product of the cores."""
        return self.multiplications > self.composed_multiplications(tokens)


def find_operators(program: Program) -> list[Operator]:
    """All matrix product operators with b or c above 1 whose cores are plain, in graph order; low-rank pairs are two linears and never slower composed."""
    sites = {s.node: s for s in program.sites() if s.kind is SiteKind.LINEAR and not s.compressed and not s.tied}
    inner = [s for s in sites.values() if s.name.endswith(INNER)]
    if inner:
        ensure_values(program)
    return [f for s in inner if (f := _operator(s, sites)) is not None]


def _operator(inner: WeightSite, sites: dict[fx.Node, WeightSite]) -> Operator | None:
    """The chain around an inner core, as `kronecker_sum.as_chain` writes it; None for any other."""
    second_first = inner.data.target is not aten.transpose.int
    split = inner.data if second_first else inner.data.args[0]
    after = [aten.unflatten.int, aten.transpose.int, aten.flatten.using_ints, aten.linear.default]
    after += [aten.transpose.int, aten.flatten.using_ints] if second_first else [aten.flatten.using_ints]
    nodes = _followers(inner.node, after)
    outer = sites.get(nodes[3]) if nodes else None
    if not isinstance(split, fx.Node) or split.target is not aten.unflatten.int or outer is None or outer.name != inner.name.removesuffix(INNER) + OUTER:
        return None
    if inner.bias is not None or outer.bias is not None or any(len(n.users) > 1 for n in (split, inner.data)):
        return None
    b, d = _sizes(split)
    first, _ = _sizes(nodes[0])
    a, c = (outer.rows, first) if second_first else (first, outer.rows)
    x = split.args[0]
    if isinstance(x, fx.Node) and x.target is aten.constant_pad_nd.default and len(x.users) == 1:
        x = x.args[0]
    cut = _followers(nodes[-1], [aten.slice.Tensor])
    assert isinstance(x, fx.Node)
    return Operator(x=x, inner=inner, outer=outer, last=cut[-1] if cut else nodes[-1], modes=(a, b, c, d), second_first=second_first)


def _sizes(unflatten: fx.Node) -> list[int]:
    sizes: list[int] = unflatten.args[2]  # type: ignore[assignment]
    return sizes


def _followers(node: fx.Node, targets: list[Any]) -> list[fx.Node]:
    """The nodes that follow, each the only user of the one before, if they call these operators; else none."""
    found: list[fx.Node] = []
    for target in targets:
        users = list((found[-1] if found else node).users)
        if len(users) != 1 or users[0].target is not target:
            return []
        found += users
    return found


def compose_operator(editor: Editor, one: Operator) -> None:
    """The chain becomes one linear with a weight that is multiplied out before it, exactly; the chain's nodes are dead then. Not journalled."""
    graph, last = editor.program.graph, one.last

    def call(target: Any, *arguments: Any) -> fx.Node:
        return take_place(graph.call_function(target, arguments), last)

    with graph.inserting_before(last):
        node = call(aten.linear.default, one.x, _weight(call, one))
    editor.replace(last, node)


def _weight(call: Callable[..., fx.Node], one: Operator) -> fx.Node:
    """Nodes that make `[rows, columns]` of the cores."""
    (a, b, c, d), bond = one.modes, one.bond
    inner, outer = (next(n for n in s.node.all_input_nodes if n.op == "get_attr") for s in (one.inner, one.outer))
    if one.second_first:  # inner [(c, r), d], outer [a, (b, r)]
        first = call(aten.view.default, outer, [a * b, bond])
        turned = call(aten.permute.default, call(aten.view.default, inner, [c, bond, d]), [1, 0, 2])
    else:  # inner [(a, r), b], outer [c, (d, r)]
        first = call(aten.reshape.default, call(aten.permute.default, call(aten.view.default, inner, [a, bond, b]), [0, 2, 1]), [a * b, bond])
        turned = call(aten.permute.default, call(aten.view.default, outer, [c, d, bond]), [2, 0, 1])
    joined = call(aten.mm.default, first, call(aten.reshape.default, turned, [bond, c * d]))
    weight = call(aten.transpose.int, call(aten.view.default, joined, [a, b, c, d]), 1, 2)
    weight = call(aten.reshape.default, weight, [a * c, b * d])
    for axis, (size, full) in enumerate(((one.rows, a * c), (one.columns, b * d))):
        weight = weight if size == full else call(aten.slice.Tensor, weight, axis, 0, size)
    return weight


def composed(program: Program, tokens: float) -> Program:
    """The program itself, or a copy in which every operator that is cheaper composed, at so many tokens a run, is. Tensors are shared."""
    if not any(o.cheaper_composed(tokens) for o in find_operators(program)):
        return program
    copy = program.clone()
    with Editor(copy, "compose") as editor:
        for one in [o for o in find_operators(copy) if o.cheaper_composed(tokens)]:
            compose_operator(editor, one)
    return copy
