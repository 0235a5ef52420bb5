"""The table of axis rules and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..atoms import Axis, MisalignedError, size_of
from ..axes import Result, Tracer
from ..nodes import argument

Rule = Callable[[Tracer, fx.Node], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operators called `names`."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def broadcast(t: Tracer, node: fx.Node, *operands: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes of operands broadcast against each other, aligned from the last."""
    rank = max(map(len, operands), default=0)
    out: list[Axis] = []
    for back in range(rank, 0, -1):
        present = [axes[-back] for axes in operands if len(axes) >= back and size_of(axes[-back]) != 1]
        for other in present[1:]:
            t.unify(present[0], other, node.name)
        out.append(present[0] if present else ())
    return tuple(out)


def place(node: fx.Node, name: str) -> tuple[int | str, ...]:
    """Where the argument called `name` stands: position, or keyword."""
    if name in node.kwargs:
        return (name,)
    return (next(i for i, a in enumerate(node.target._schema.arguments) if a.name == name),)  # type: ignore[union-attr]


def dims(node: fx.Node, rank: int, name: str = "dim") -> list[int]:
    """The dimensions an argument names, counted from the front; all of them when it is None or empty."""
    given: Any = argument(node, name)
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return list(range(rank))
    return [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]


def dim(node: fx.Node, rank: int, name: str = "dim") -> int:
    """The one dimension an argument names."""
    if rank == 0:
        raise MisalignedError
    return int(argument(node, name)) % rank


def ints(values: Any) -> list[int]:
    """A list of plain ints, or `MisalignedError` when some are symbolic."""
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, int) for v in values):
        raise MisalignedError
    return list(values)
