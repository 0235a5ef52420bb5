"""Reductions: the axes they go over vanish."""

from __future__ import annotations

from torch import fx

from ..axes import Result, Tracer
from ..nodes import argument
from .registry import dims, rule


def _reduced(t: Tracer, node: fx.Node, over: list[int]) -> Result:
    axes = t.of(node.args[0])
    keep = argument(node, "keepdim")
    out = tuple(() if d in over else axis for d, axis in enumerate(axes) if keep or d not in over)
    return [out, out] if isinstance(node.meta["val"], (tuple, list)) else out


@rule("aten.mean", "aten.sum", "aten.var", "aten.std", "aten.var_mean", "aten.std_mean", "aten.linalg_vector_norm", "aten.norm", "aten.nansum")
def averaged(t: Tracer, node: fx.Node) -> Result:
    """Removing from an averaged axis is legal, but is not the same as zeroing: the mean, or what feeds the sum, changes."""
    axes = t.of(node.args[0])
    over = dims(node, len(axes))
    for d in over:
        t.reduce(axes[d], node.name)
    return _reduced(t, node, over)


@rule("aten.amax", "aten.amin", "aten.max", "aten.min", "aten.prod", "aten.any", "aten.all", "aten.logsumexp", "aten.argmax", "aten.argmin", "aten.median",
      "aten.kthvalue", "aten.mode")  # fmt: skip
def selected(t: Tracer, node: fx.Node) -> Result:
    """A zeroed index could win or lose: the axis is pinned. The binary forms of max and min are element-wise."""
    if isinstance(argument(node, "other"), fx.Node):
        from .pointwise import pointwise

        return pointwise(t, node)
    axes = t.of(node.args[0])
    over = dims(node, len(axes))
    for d in over:
        t.pin(axes[d], f"{node.name} selects among its positions")
    return _reduced(t, node, over)
