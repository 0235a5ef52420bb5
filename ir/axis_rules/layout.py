"""Operators that only rearrange: views, permutations, cuts and joins."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..atoms import Axis, MisalignedError, size_of
from ..axes import Result, Tracer, hint
from ..nodes import argument
from .registry import dim, dims, place, rule


@rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.view_copy")
def view(t: Tracer, node: fx.Node) -> Result:
    """Old and new axes are grouped so that the groups hold equally many positions; inside a group both are one product."""
    old, new = t.of(node.args[0]), t.fresh(node)
    for mine, other in _groups(old, new):
        t.unify(sum(mine, ()), sum(other, ()), node.name)
    _size_constants(t, node, "size" if argument(node, "size") is not None else "shape", new)
    return new


def _groups(old: tuple[Axis, ...], new: tuple[Axis, ...]) -> list[tuple[list[Axis], list[Axis]]]:
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = list(old[i : i + 1]), list(new[j : j + 1])
        i, j = i + 1, j + 1
        while _size(a) != _size(b):
            if _size(a) < _size(b) and i < len(old):
                a.append(old[i])
                i += 1
            elif j < len(new):
                b.append(new[j])
                j += 1
            else:
                raise MisalignedError
        groups.append((a, b))
    return groups


def _size(axes: list[Axis]) -> int:
    return size_of(sum(axes, ()))


def _size_constants(t: Tracer, node: fx.Node, name: str, axes: tuple[Axis, ...]) -> None:
    """Fixed sizes in a shape argument are constants of the graph; -1 follows by itself, a computed size follows nothing."""
    where = place(node, name)
    for i, (size, axis) in enumerate(zip(argument(node, name), axes, strict=False)):
        if isinstance(size, int) and size != -1:
            t.constant(node, (*where, i), axis)
        elif isinstance(size, fx.Node):
            t.pin(axis, f"{node.name} computes its size")


@rule("aten.expand", "aten.expand_copy")
def expand(t: Tracer, node: fx.Node) -> Result:
    """Axes of size 1 grow; new ones have no parameter of their own until they meet one."""
    old, new = t.of(node.args[0]), list(t.fresh(node))
    for back, axis in enumerate(reversed(old), 1):
        if size_of(axis) == size_of(new[-back]):
            new[-back] = axis
    _size_constants(t, node, "size", tuple(new))
    return tuple(new)


@rule("aten.repeat")
def repeat(t: Tracer, node: fx.Node) -> Result:
    """Tiles: the copies are the outer factor."""
    counts = list(node.args[1])  # type: ignore[arg-type]
    old = ((),) * (len(counts) - len(t.of(node.args[0]))) + t.of(node.args[0])
    out = []
    for i, (count, axis) in enumerate(zip(counts, old, strict=True)):
        if not isinstance(count, int):
            raise MisalignedError
        copies = t.axis(count)
        if count != 1:
            t.constant(node, (1, i), copies)
        out.append(copies + axis)
    return tuple(out)


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(t: Tracer, node: fx.Node) -> Result:
    """Repeats every position: the copies are the inner factor."""
    axes, count = list(t.of(node.args[0])), argument(node, "repeats")
    if not isinstance(count, int) or argument(node, "dim") is None:
        raise MisalignedError
    copies = t.axis(count)
    t.constant(node, place(node, "repeats"), copies)
    d = dim(node, len(axes))
    axes[d] = axes[d] + copies
    return tuple(axes)


@rule("aten.permute", "aten.permute_copy")
def permute(t: Tracer, node: fx.Node) -> Result:
    """Axes in another order."""
    axes = t.of(node.args[0])
    return tuple(axes[d] for d in argument(node, "dims"))


@rule("aten.transpose")
def transpose(t: Tracer, node: fx.Node) -> Result:
    """Two axes change places."""
    axes = list(t.of(node.args[0]))
    i, j = (int(d) % len(axes) for d in node.args[1:3])  # type: ignore[arg-type]
    axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


@rule("aten.t")
def matrix_transpose(t: Tracer, node: fx.Node) -> Result:
    """The axes of a matrix change places."""
    return t.of(node.args[0])[::-1]


@rule("aten.unsqueeze")
def unsqueeze(t: Tracer, node: fx.Node) -> Result:
    """A new axis of size 1."""
    axes = list(t.of(node.args[0]))
    axes.insert(int(argument(node, "dim")) % (len(axes) + 1), ())
    return tuple(axes)


@rule("aten.squeeze")
def squeeze(t: Tracer, node: fx.Node) -> Result:
    """Axes of size 1 vanish."""
    axes = t.of(node.args[0])
    over = dims(node, len(axes))
    return tuple(a for d, a in enumerate(axes) if not (d in over and size_of(a) == 1))


@rule("aten.select")
def select(t: Tracer, node: fx.Node) -> Result:
    """One position of an axis, named by number: the axis is pinned."""
    axes = t.of(node.args[0])
    d = dim(node, len(axes))
    t.pin(axes[d], f"{node.name} picks a position of it")
    return axes[:d] + axes[d + 1 :]


@rule("aten.unbind")
def unbind(t: Tracer, node: fx.Node) -> Result:
    """Every position of an axis for itself: the axis is pinned."""
    axes = t.of(node.args[0])
    d = dim(node, len(axes))
    t.pin(axes[d], f"{node.name} takes its positions apart")
    return [axes[:d] + axes[d + 1 :]] * size_of(axes[d])


@rule("aten.slice")
def cut(t: Tracer, node: fx.Node) -> Result:
    """A range of an axis is one part of a concatenation; start and end follow the parts before it."""
    axes = list(t.of(node.args[0]))
    d = dim(node, len(axes))
    size, length = size_of(axes[d]), hint(node.meta["val"].shape[d])
    if length == size:
        return tuple(axes)
    start = argument(node, "start") or 0
    if argument(node, "step") not in (None, 1) or not isinstance(start, int) or length == 0:
        t.pin(axes[d], f"{node.name} takes every n-th or a computed range")
        axes[d] = t.pinned(node, f"a computed range at {node.name}")[d]
        return tuple(axes)
    start = max(start + size, 0) if start < 0 else start
    sizes = [start, length, size - start - length]
    parts = t.split(axes[d], [s for s in sizes if s])
    before = (parts[0],) if start else ()
    axes[d] = parts[len(before)]
    _range_constants(t, node, before, axes[d], tuple(parts[len(before) + 1 :]))
    return tuple(axes)


def _range_constants(t: Tracer, node: fx.Node, before: tuple[Axis, ...], part: Axis, after: tuple[Axis, ...]) -> None:
    """Start and end follow the parts before them, negative ones those behind."""
    start, end = argument(node, "start"), argument(node, "end")
    if before and start < 0:
        t.constant(node, place(node, "start"), part, *after, sign=-1)
    elif before:
        t.constant(node, place(node, "start"), *before)
    if isinstance(end, int) and end < 0:
        t.constant(node, place(node, "end"), *after, sign=-1)
    elif isinstance(end, int):
        t.constant(node, place(node, "end"), *before, part)
    elif end is not None or not isinstance(start, (int, type(None))):
        t.pin(part, f"{node.name} takes a computed range")


@rule("aten.split", "aten.split_with_sizes", "aten.split_copy")
def split(t: Tracer, node: fx.Node) -> Result:
    """All parts of an axis that is their concatenation."""
    axes, values = t.of(node.args[0]), node.meta["val"]
    d = dim(node, len(axes))
    if len(values) == 1:
        return [axes]
    parts = t.split(axes[d], [hint(v.shape[d]) for v in values])
    t.splits.append((node, tuple(parts)))
    return [(*axes[:d], part, *axes[d + 1 :]) for part in parts]


@rule("aten.cat", "aten.concat")
def cat(t: Tracer, node: fx.Node) -> Result:
    """One axis is the concatenation of the inputs', the others are the same."""
    inputs: Any = node.args[0]
    operands = [t.of(x) for x in inputs]
    d = dim(node, len(operands[0]))
    out = list(operands[0])
    for axes in operands[1:]:
        for i, (mine, other) in enumerate(zip(operands[0], axes, strict=True)):
            if i != d:
                t.unify(mine, other, node.name)
    out[d] = t.concat([axes[d] for axes in operands])
    return tuple(out)


@rule("aten.stack")
def stack(t: Tracer, node: fx.Node) -> Result:
    """A new axis, one position an input: pinned."""
    inputs: Any = node.args[0]
    operands = [t.of(x) for x in inputs]
    for axes in operands[1:]:
        for mine, other in zip(operands[0], axes, strict=True):
            t.unify(mine, other, node.name)
    new = t.axis(len(operands))
    t.pin(new, f"{node.name} makes it")
    d = int(argument(node, "dim") or 0) % (len(operands[0]) + 1)
    return (*operands[0][:d], new, *operands[0][d:])
