"""Operators that pick positions by data or by number."""

from __future__ import annotations

from torch import fx

from ..atoms import Axis, MisalignedError, size_of
from ..axes import Result, Tracer
from ..nodes import argument
from .registry import broadcast, dim, rule


@rule("aten.embedding")
def embedding(t: Tracer, node: fx.Node) -> Result:
    """Rows are picked by ids, which must keep their meaning."""
    weight, ids = t.of(argument(node, "weight")), t.of(argument(node, "indices"))
    t.pin(weight[0], f"rows of {node.name} are ids")
    return (*ids, weight[1])


@rule("aten.index_select")
def index_select(t: Tracer, node: fx.Node) -> Result:
    """One axis is replaced by the index's."""
    axes, d = list(t.of(node.args[0])), dim(node, len(t.of(node.args[0])))
    t.pin(axes[d], f"{node.name} picks from it")
    axes[d] = t.of(argument(node, "index"))[0] if t.of(argument(node, "index")) else ()
    return tuple(axes)


@rule("aten.gather", "aten.take_along_dim")
def gather(t: Tracer, node: fx.Node) -> Result:
    """The result has the index's axes; what it picks from is pinned."""
    axes = t.of(node.args[0])
    index = t.of(argument(node, "index" if argument(node, "index") is not None else "indices"))
    over = dim(node, len(axes))
    for d, (mine, other) in enumerate(zip(axes, index, strict=True)):
        if d != over and size_of(mine) == size_of(other):
            t.unify(mine, other, node.name)
        else:
            t.pin(mine, f"{node.name} picks from it")
            t.pin(other, f"{node.name} picks by it")
    return index


@rule("aten.index")
def index(t: Tracer, node: fx.Node) -> Result:
    """`self[i, :, j]`: indexed axes are pinned and replaced by the broadcast axes of the indices."""
    axes, given = t.of(node.args[0]), list(argument(node, "indices"))
    used = [i for i, x in enumerate(given) if x is not None]
    picked = broadcast(t, node, *(t.of(given[i]) for i in used))
    for i in used:
        if "bool" in str(given[i].meta["val"].dtype):
            raise MisalignedError
        t.pin(axes[i], f"{node.name} picks from it")
    kept: list[Axis] = [a for i, a in enumerate(axes) if i not in used]
    first = used[0] if used == list(range(used[0], used[0] + len(used))) else 0
    return (*kept[:first], *picked, *kept[first:])


@rule("aten.one_hot")
def one_hot(t: Tracer, node: fx.Node) -> Result:
    """Adds an axis of ids."""
    new = t.pinned(node, "one-hot ids")[-1]
    return (*t.of(node.args[0]), new)


@rule("aten.topk")
def top(t: Tracer, node: fx.Node) -> Result:
    """Selects along one axis, which is pinned."""
    axes = list(t.of(node.args[0]))
    d = dim(node, len(axes))
    t.pin(axes[d], f"{node.name} selects among its positions")
    fresh = t.pinned(node, f"selected by {node.name}")
    out = tuple(f if i == d else a for i, (a, f) in enumerate(zip(axes, fresh[0], strict=True)))
    return [out, out]
