"""Symbolic axes of a whole program: which parameter dimensions belong together and can be made smaller together.

Every tensor's axes are products and concatenations of atoms (`atoms`); one rule per operator (`axis_rules`) unifies them in one walk over the graph. The
leaves that remain are the *axis classes*: removing index `i` of a class removes the same positions from every parameter that holds it. It fails closed:
an operator without a rule pins every axis it touches and is listed with its node.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from .atoms import Algebra, Atom, Axis, Kind, MisalignedError, factors, leaves, size_of, squared
from .nodes import get_tensor, op_name
from .program import Program
from .weights import AliasClasses, alias_classes

# what a rule may raise on arguments of a form it does not know
UNFIT = (MisalignedError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration)
Result = Any  # tuple of axes for a tensor, list of such (or None) for several results, None for no tensor


@dataclass(frozen=True)
class Occurrence:
    """One parameter or buffer dimension that holds a class. `multiplicity`: positions that one index of the class stands for."""

    tensor: str
    dim: int
    multiplicity: int


@dataclass(frozen=True, eq=False)
class AxisClass:
    """An independent structural variable: `size` indices, and every (tensor, dim) they occur in.

    `pinned`: reasons why nothing may be removed from it. `reductions`: nodes that average, normalise or sum over it something that zeroed parameters do not
    make zero; without them removing an index equals zeroing it everywhere.
    """

    name: str
    size: int
    occurrences: tuple[Occurrence, ...]
    pinned: tuple[str, ...]
    reductions: tuple[str, ...]
    atom: Atom = field(repr=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.size})"


@dataclass(frozen=True)
class Constant:
    """An int of the graph that is the summed size of `axes`, or minus that; `path` leads to it through the node's arguments."""

    node: fx.Node
    path: tuple[int | str, ...]
    axes: tuple[Axis, ...]
    sign: int = 1


Choice = Mapping[Atom, Tensor]  # leaf -> kept indices, int64, in their new order


@dataclass(frozen=True, eq=False)
class AxisAnalysis:
    """What the walk found.

    `axes`: per node a tuple of axes (one a dimension), or a list of such for several results. `constants`: the shape constants that follow the classes.
    `splits`: nodes that cut an axis, with the parts. `scales`: attention nodes whose default scale follows an axis. `work`: per multiplying node the axes
    whose product is its number of multiply-accumulates. `unruled`: operators without a rule, with why. `packed`: per compressed linear that may be cut to
    prefixes its two axes `[N, K]`.
    """

    program: Program
    axes: Mapping[fx.Node, Result]
    classes: tuple[AxisClass, ...]
    constants: tuple[Constant, ...]
    splits: tuple[tuple[fx.Node, tuple[Axis, ...]], ...]
    scales: tuple[tuple[fx.Node, Axis], ...]
    work: Mapping[fx.Node, Axis]
    unruled: tuple[tuple[fx.Node, str], ...]
    tensors: Mapping[str, tuple[Axis, ...]]
    packed: Mapping[fx.Node, tuple[Axis, Axis]]

    def class_named(self, name: str) -> AxisClass:
        """The class called `name`."""
        return next(c for c in self.classes if c.name == name)

    def holders(self, one: AxisClass) -> Iterator[tuple[str, int, Axis]]:
        """Every `(tensor, dim, axis)` that holds the class."""
        for occurrence in one.occurrences:
            yield occurrence.tensor, occurrence.dim, self.tensors[occurrence.tensor][occurrence.dim]

    def parameters(self, choice: Choice | None = None) -> int:
        """Stored floating-point elements and packed weights under a choice, tied tensors counted once."""
        held = [*(self.tensors[name] for name in self._floats), *self.packed.values()]
        return sum(prod(kept_size(a, choice or {}) for a in axes) for axes in held)

    @cached_property
    def _floats(self) -> list[str]:
        return [name for name in self.tensors if get_tensor(self.program.graph_module, name).is_floating_point()]

    def macs(self, choice: Choice | None = None) -> int:
        """Multiply-accumulates of one run on the example inputs under a choice."""
        return sum(kept_size(axis, choice or {}) for axis in self.work.values())

    def to_text(self) -> str:
        """One line a class, then the operators without a rule."""
        lines = [f"{c}{' pinned: ' + c.pinned[0] if c.pinned else ''}: " + ", ".join(_occurrence(o) for o in c.occurrences) for c in self.classes]
        return "\n".join(lines + [f"no rule: {op_name(n)} at {n.name}: {why}" for n, why in self.unruled])


def _occurrence(one: Occurrence) -> str:
    return f"{one.tensor}[{one.dim}]" + (f"*{one.multiplicity}" if one.multiplicity > 1 else "")


def kept_size(axis: Sequence[Atom], choice: Choice) -> int:
    """Size of the axis when of each chosen leaf only the chosen indices are kept."""
    total = 1
    for atom in factors(axis):
        if atom.kind is Kind.CONCAT:
            total *= sum(kept_size(p, choice) for p in atom.parts)
        else:
            total *= len(choice[atom]) if atom in choice else atom.size
    return total


def kept_positions(axis: Sequence[Atom], choice: Choice) -> Tensor:
    """Positions of the axis that stay, `[kept] int64`, in their new order."""
    kept = torch.zeros(1, dtype=torch.int64)
    for atom in factors(axis):
        if atom.kind is Kind.CONCAT:
            starts = [0]
            for part in atom.parts:
                starts.append(starts[-1] + size_of(part))
            own = torch.cat([kept_positions(p, choice) + s for p, s in zip(atom.parts, starts, strict=False)])
        else:
            own = choice[atom] if atom in choice else torch.arange(atom.size)
        kept = (kept.unsqueeze(1) * atom.size + own).flatten()
    return kept


def labels(axis: Sequence[Atom], leaf: Atom) -> Tensor:
    """Per position of the axis the index of `leaf` it belongs to, `[size] int64`; -1 where it belongs to none."""
    found = torch.full((1,), -1, dtype=torch.int64)
    for atom in factors(axis):
        if atom.kind is Kind.CONCAT:
            own = torch.cat([labels(p, leaf) for p in atom.parts])
        else:
            own = torch.arange(atom.size) if atom is leaf else torch.full((atom.size,), -1, dtype=torch.int64)
        found = torch.maximum(found.unsqueeze(1), own).flatten()
    return found


class Tracer(Algebra):
    """Walks a graph once; the axis rules see it as `t`."""

    def __init__(self, program: Program, *, prefixes: bool = False) -> None:
        super().__init__()
        self.program, self.prefixes = program, prefixes
        self.packed: dict[fx.Node, tuple[Axis, Axis]] = {}
        self.axes: dict[fx.Node, Result] = {}
        self.constants: list[Constant] = []
        self.splits: list[tuple[fx.Node, tuple[Axis, ...]]] = []
        self.scales: list[tuple[fx.Node, Axis]] = []
        self.work: dict[fx.Node, Axis] = {}
        self.sums: list[tuple[fx.Node, Axis, tuple[Any, ...]]] = []
        self.unruled: list[tuple[fx.Node, str]] = []
        self.tensors: dict[str, tuple[Axis, ...]] = {}
        self._aliases: AliasClasses = alias_classes(program.graph_module)
        self._caches = program.cache_nodes

    def of(self, node: Any) -> tuple[Axis, ...]:
        """Axes of a tensor argument; a Python number has none."""
        if not isinstance(node, fx.Node):
            return ()
        found = self.axes[node]
        if not isinstance(found, tuple):
            raise MisalignedError
        return found

    def fresh(self, node: fx.Node) -> Result:
        """New axes for the node's value, of its sizes."""
        return self._fresh(node.meta.get("val"))

    def _fresh(self, value: Any) -> Result:
        if isinstance(value, Tensor):
            return tuple(self.axis(hint(s)) for s in value.shape)
        return [self._fresh(v) for v in value] if isinstance(value, (tuple, list)) else None

    def pinned(self, node: fx.Node, why: str) -> Result:
        """New pinned axes for the node's value."""
        result = self.fresh(node)
        self._pin_result(result, why)
        return result

    def constant(self, node: fx.Node, path: tuple[int | str, ...], *axes: Axis, sign: int = 1) -> None:
        """Note that the int at `path` is the summed size of `axes`, or minus that."""
        self.constants.append(Constant(node, path, axes, sign))

    def contract(self, node: fx.Node, axes: Sequence[Axis], summed: Axis, operands: Sequence[Any]) -> None:
        """Note the node's multiply-accumulates, the product of `axes`, and that it sums the product of `operands` over `summed`."""
        self.work[node] = tuple(a for axis in axes for a in axis)
        self.sums.append((node, summed, tuple(operands)))

    def walk(self) -> AxisAnalysis:
        """Run every node's rule, then read off the classes."""
        for node in self.program.graph.nodes:
            self.axes[node] = self._result(node)
        self.settle()
        self._note_sums()
        return AxisAnalysis(
            self.program, self.axes, tuple(self._classes()), tuple(self.constants), tuple(self.splits), tuple(self.scales), self.work, tuple(self.unruled),
            self.tensors, self.packed,
        )  # fmt: skip

    def _note_sums(self) -> None:
        """A sum of products none of which vanishes where a class is masked differs when its index is removed instead."""
        from .vanish import vanishes

        for node, axis, operands in self.sums:
            for leaf in dict.fromkeys(leaves(axis)):
                if not any(vanishes(self, x, leaf) for x in operands):
                    leaf.reductions.append(node.name)

    def _result(self, node: fx.Node) -> Result:
        if node.op == "get_attr":
            return self._stored(node)
        if node.op == "placeholder":
            return self.fresh(node) if node in self._caches else self.pinned(node, "an input of the model")
        if node.op == "output":
            for source in node.all_input_nodes:
                if self._caches.isdisjoint(source.all_input_nodes):  # a cache that has grown has the axes of the one that was given
                    self._pin_result(self.axes[source], "an output of the model")
            return None
        return self._call(node)

    def _stored(self, node: fx.Node) -> Result:
        """Axes of a parameter or buffer; tied names are one tensor."""
        name = self._aliases.of(str(node.target))[0]
        tensor = get_tensor(self.program.graph_module, str(node.target))
        if name not in self.tensors:
            self.tensors[name] = tuple(self.axis(s) for s in tensor.shape)
        if not tensor.is_floating_point() and not _only_picks(node):
            self._pin_result(self.tensors[name], f"{name} holds {tensor.dtype}, not weights")
        if tuple(map(size_of, self.tensors[name])) == tuple(tensor.shape):
            return self.tensors[name]
        self._pin_result(self.tensors[name], f"{node.target} is another view of its storage")
        return tuple(self._pinned_axis(s, f"a view of {name}") for s in tensor.shape)

    def _pinned_axis(self, size: int, why: str) -> Axis:
        axis = self.axis(size)
        self.pin(axis, why)
        return axis

    def _call(self, node: fx.Node) -> Result:
        from .axis_rules import rule_for

        value = node.meta.get("val")
        if not _holds_tensor(value):
            return None
        rule = rule_for(node)
        if rule is None:
            return self._refuse(node, "no axis rule")
        try:
            result = rule(self, node)
        except UNFIT:
            return self._refuse(node, "its arguments do not fit the rule")
        return result if _fits(result, value) else self._refuse(node, "the rule gave another shape than the operator")

    def _refuse(self, node: fx.Node, why: str) -> Result:
        """Pin every axis the node touches."""
        self.unruled.append((node, why))
        reason = f"{why}: {op_name(node)} at {node.name}"
        for source in node.all_input_nodes:
            self._pin_result(self.axes[source], reason)
        return self.pinned(node, reason)

    def _pin_result(self, result: Result, why: str) -> None:
        if isinstance(result, list):
            for one in result:
                self._pin_result(one, why)
        elif result is not None:
            for axis in result:
                self.pin(axis, why)

    def _classes(self) -> Iterator[AxisClass]:
        found: dict[Atom, list[Occurrence]] = defaultdict(list)
        names: dict[Atom, str] = {}
        for tensor, axes in self.tensors.items():
            for dim, axis in enumerate(axes):
                counts = Counter(leaves(axis))
                for leaf in squared(axis):
                    leaf.pins.append(f"{tensor}[{dim}] holds it against itself")
                for i, leaf in enumerate(counts):
                    positions = int((labels(axis, leaf) == 0).sum())
                    found[leaf].append(Occurrence(tensor, dim, positions))
                    names.setdefault(leaf, f"{tensor}[{dim}]" + (f".{i}" if len(counts) > 1 else ""))
        for node, axes in self.packed.items():
            for dim, axis in enumerate(axes):
                for leaf in dict.fromkeys(leaves(axis)):
                    found.setdefault(leaf, [])
                    names.setdefault(leaf, f"{node.meta.get('fxpress_site', node.name)}.weight[{dim}]")
        for leaf, occurrences in found.items():
            yield AxisClass(names[leaf], leaf.size, tuple(occurrences), tuple(dict.fromkeys(leaf.pins)), tuple(dict.fromkeys(leaf.reductions)), leaf)


def hint(size: int | torch.SymInt) -> int:
    """The size on the example inputs; an axis whose size the data decide gets one that fits nothing else."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return int(known) if known is not None else 2**61 - 1


def _only_picks(node: fx.Node) -> bool:
    """Whether the stored integers are read as indices alone: fewer of them pick fewer positions, and what they pick from is pinned by its rule."""
    return bool(node.users) and all(u.target is torch.ops.aten.index.Tensor and u.args[0] is not node for u in node.users)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))


def _fits(result: Result, value: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(result, tuple) and [size_of(a) for a in result] == [hint(s) for s in value.shape]
    return isinstance(result, list) and all(not isinstance(v, Tensor) or _fits(r, v) for r, v in zip(result, value, strict=True))


def analyze_axes(program: Program, *, prefixes: bool = False) -> AxisAnalysis:
    """The axis classes of `program`, found in one walk over its graph.

    Compressed weights pin what they multiply by; with `prefixes` classes of compressed linears whose format takes prefixes are free: to be cut to their
    first indices only.
    """
    from .shapes import ensure_values

    ensure_values(program)
    return Tracer(program, prefixes=prefixes).walk()
