"""Operators that make tensors from nothing: their sizes follow whatever their axes are unified with later."""

from __future__ import annotations

from torch import fx

from ..axes import Result, Tracer
from ..nodes import argument
from .registry import place, rule


@rule("aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.rand", "aten.randn", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty")
def filled(t: Tracer, node: fx.Node) -> Result:
    """New axes; the sizes of fixed ones are constants of the graph."""
    axes = t.fresh(node)
    where = place(node, "size")
    for i, size in enumerate(argument(node, "size")):
        if isinstance(size, int):
            t.constant(node, (*where, i), axes[i])
        else:
            t.pin(axes[i], f"{node.name} takes its size from the data")
    return axes


@rule("aten.arange", "aten.linspace", "aten.eye", "aten.scalar_tensor", "aten.randperm", "aten.randint")
def positions(t: Tracer, node: fx.Node) -> Result:
    """Values that depend on the position."""
    return t.pinned(node, f"{node.name} numbers its positions")
