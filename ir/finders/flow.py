"""What the finders share: who depends on whom, which values are activations, and walks that stop at weight sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..atoms import Atom, Axis, leaves
from ..axes import AxisAnalysis, AxisClass
from ..nodes import op_name
from ..sites import CONVOLUTIONS, SiteKind, WeightSite

LINEAR = (SiteKind.LINEAR, SiteKind.ADDMM, SiteKind.MM)
ATTENTION = ("aten.scaled_dot_product_attention", "aten._scaled_dot_product_flash_attention_for_cpu")
SAME = frozenset(
    f"aten.{name}" for name in (
        "clone", "alias", "detach", "contiguous", "_to_copy", "to", "dropout", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute",
        "transpose", "t", "movedim", "unsqueeze", "squeeze", "expand", "type_as", "lift_fresh_copy", "swapaxes",
    )
) | {"getitem"}  # fmt: skip


class Flow:
    """A program with its axes, seen as a flow of activations. *Live* nodes depend on a weight site or on a floating-point input; the others are tables."""

    def __init__(self, analysis: AxisAnalysis) -> None:
        self.analysis = analysis
        self.program = analysis.program
        self.nodes: list[fx.Node] = list(self.program.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.sites: dict[fx.Node, WeightSite] = {s.node: s for s in self.program.sites()}
        self._classes = {c.atom: c for c in analysis.classes}
        self._unruled = {node for node, _ in analysis.unruled}
        self.live: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.sites or _is_float_input(node) or any(i in self.live for i in node.all_input_nodes):
                self.live.add(node)

    @cached_property
    def above(self) -> list[int]:
        """Per node the set of its ancestors, a bit mask over graph positions."""
        masks: list[int] = []
        for node in self.nodes:
            mask = 0
            for source in node.all_input_nodes:
                i = self.index[source]
                mask |= masks[i] | 1 << i
            masks.append(mask)
        return masks

    @cached_property
    def below(self) -> list[int]:
        """Per node the set of its descendants."""
        masks = [0] * len(self.nodes)
        for i in reversed(range(len(self.nodes))):
            for source in self.nodes[i].all_input_nodes:
                masks[self.index[source]] |= masks[i] | 1 << i
        return masks

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `source` is an ancestor of `node`."""
        return bool(self.above[self.index[node]] >> self.index[source] & 1)

    def mask(self, nodes: Iterable[fx.Node]) -> int:
        """The nodes as a bit mask."""
        total = 0
        for node in nodes:
            total |= 1 << self.index[node]
        return total

    def members(self, mask: int) -> list[fx.Node]:
        """The nodes of a bit mask, in graph order."""
        return [node for i, node in enumerate(self.nodes) if mask >> i & 1]

    def live_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Inputs of the node that are activations."""
        return [n for n in node.all_input_nodes if n in self.live]

    def mixes(self, node: fx.Node) -> bool:
        """Whether the node multiplies and sums, or brings activations together in an unknown way: walks do not pass it."""
        return node not in self.sites and (node in self.analysis.work or (node in self._unruled and len(self.live_inputs(node)) > 1))

    def walk_back(self, start: fx.Node, stop: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
        """Live ancestors of `start` (with itself), nearest first, not past nodes for which `stop` holds: `(passed, stopped at)`."""
        return _walk(start, stop, self.live_inputs)

    def walk_on(self, start: fx.Node, stop: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The same towards the users, from the users of `start` on."""
        passed: list[fx.Node] = []
        stopped: list[fx.Node] = []
        for user in start.users:
            ahead, ends = _walk(user, stop, lambda n: list(n.users))
            passed += ahead
            stopped += ends
        return list(dict.fromkeys(passed)), list(dict.fromkeys(stopped))

    def is_end(self, node: fx.Node) -> bool:
        """Whether a walk along activations ends here: at a weight site or a mixing operator."""
        return node in self.sites or self.mixes(node)

    def writers(self, node: fx.Node) -> list[WeightSite]:
        """The sites that `node` is computed from without another site or mixing operator between."""
        return [self.sites[n] for n in self.walk_back(node, self.is_end)[1] if n in self.sites]

    def leaves(self, node: fx.Node) -> set[Atom]:
        """The leaves of all axes of the node's value (of several: of the first)."""
        axes = self.analysis.axes.get(node)
        axes = axes[0] if isinstance(axes, list) else axes
        return {leaf for axis in axes for leaf in leaves(axis)} if isinstance(axes, tuple) else set()

    def out_axis(self, site: WeightSite) -> Axis:
        """The axis the site makes."""
        axes: Any = self.analysis.axes[site.node]
        return axes[_channel(site)]

    def in_axis(self, site: WeightSite) -> Axis:
        """The axis the site sums over (embedding: none)."""
        axes: Any = self.analysis.axes[site.data]
        return () if site.kind is SiteKind.EMBEDDING else axes[_channel(site)]

    def out_leaves(self, *sites: WeightSite | None) -> set[Atom]:
        """Leaves of the sites' out axes."""
        return {leaf for s in sites if s is not None for leaf in leaves(self.out_axis(s))}

    def in_leaves(self, *sites: WeightSite | None) -> set[Atom]:
        """Leaves of the sites' in axes."""
        return {leaf for s in sites if s is not None for leaf in leaves(self.in_axis(s))}

    def classes(self, found: Iterable[Atom]) -> tuple[AxisClass, ...]:
        """The classes of the leaves, in the order of the analysis; leaves that no parameter holds are left out."""
        wanted = set(found)
        return tuple(c for c in self.analysis.classes if c.atom in wanted)

    def class_of(self, leaf: Atom) -> AxisClass | None:
        """The class of a leaf."""
        return self._classes.get(leaf)

    def path_between(self, site: WeightSite, end: fx.Node) -> list[fx.Node]:
        """Nodes from the site (without it) to `end`, in graph order, on ways without another site."""
        passed = set(self.walk_back(end, self.is_end)[0])
        below = self.below[self.index[site.node]]
        return [n for n in self.nodes if n in passed and below >> self.index[n] & 1]

    def common_live(self, a: fx.Node, b: fx.Node) -> Iterator[fx.Node]:
        """Live nodes that are ancestors of both (or the nodes themselves), latest first."""
        i, j = self.index[a], self.index[b]
        shared = (self.above[i] | 1 << i) & (self.above[j] | 1 << j)
        return (n for n in reversed(self.members(shared)) if n in self.live)


def _walk(start: fx.Node, stop: Callable[[fx.Node], bool], ahead: Callable[[fx.Node], list[fx.Node]]) -> tuple[list[fx.Node], list[fx.Node]]:
    queue, seen = [start], {start}
    passed: list[fx.Node] = []
    stopped: list[fx.Node] = []
    while queue:
        node = queue.pop(0)
        if stop(node):
            stopped.append(node)
            continue
        passed.append(node)
        for following in ahead(node):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return passed, stopped


def _is_float_input(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point()


def _channel(site: WeightSite) -> int:
    return 1 - len(site.shape) if site.kind in CONVOLUTIONS else -1


def is_add(node: fx.Node) -> bool:
    """Whether the node adds two tensors of one shape."""
    if node.target is not torch.ops.aten.add.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return False
    shapes = [tuple(a.meta["val"].shape) for a in node.args[:2] if isinstance(a.meta.get("val"), Tensor)]  # type: ignore[union-attr]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def short_name(node: fx.Node) -> str:
    """Operator name without overload: `aten.mul`."""
    return ".".join(op_name(node).split(".")[:2])


def stored_name(node: Any) -> str | None:
    """Name of the tensor a `get_attr` node reads, None for anything else."""
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None
