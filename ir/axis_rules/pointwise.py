"""Operators that work element by element, and those that hand their input's axes on."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from ..axes import Result, Tracer
from ..nodes import argument
from .registry import broadcast, dims, rule


def is_pointwise(node: fx.Node) -> bool:
    """Whether torch tags the operator as element-wise."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


@rule("pointwise", "aten.where", "aten.masked_fill", "aten.lerp", "aten.addcmul", "aten.addcdiv", "aten.clamp", "aten.hardtanh", "aten.hardswish",
      "aten.hardsigmoid", "aten.relu6", "aten._prelu_kernel", "aten.__and__", "aten.__or__")  # fmt: skip
def pointwise(t: Tracer, node: fx.Node) -> Result:
    """All tensor arguments broadcast."""
    tensors = [a for a in pytree.tree_leaves((node.args, node.kwargs), is_leaf=_is_node) if _is_tensor(a)]
    return broadcast(t, node, *(t.of(a) for a in tensors))


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


@rule("aten.clone", "aten.alias", "aten.detach", "aten._to_copy", "aten.zeros_like", "aten.ones_like", "aten.full_like",
      "aten.empty_like", "aten.rand_like", "aten.randn_like", "aten.bernoulli", "aten.fill", "aten.type_as")  # fmt: skip
def same(t: Tracer, node: fx.Node) -> Result:
    """The first argument's axes."""
    return t.of(node.args[0])


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten._safe_softmax", "aten.cumsum", "aten.cumprod", "aten.logcumsumexp",
      "aten.cummax", "aten.flip", "aten.roll", "aten.sort", "aten.argsort")  # fmt: skip
def along(t: Tracer, node: fx.Node) -> Result:
    """Keeps all axes; those it works along are pinned, for they mix positions."""
    axes = t.of(node.args[0])
    name = "dims" if argument(node, "dims") is not None else "dim"
    for d in dims(node, len(axes), name):
        t.pin(axes[d], f"{node.name} mixes its positions")
    return [axes, axes] if isinstance(node.meta["val"], (tuple, list)) else axes


@rule("aten.tril", "aten.triu")
def triangle(t: Tracer, node: fx.Node) -> Result:
    """Positions of the last two axes matter."""
    axes = t.of(node.args[0])
    for axis in axes[-2:]:
        t.pin(axis, f"{node.name} depends on its positions")
    return axes


@rule("aten.glu")
def gated(t: Tracer, node: fx.Node) -> Result:
    """The halves of one axis are multiplied."""
    axes = list(t.of(node.args[0]))
    d = int(argument(node, "dim")) % len(axes)
    half = int(node.meta["val"].shape[d])
    first, second = t.split(axes[d], [half, half])
    axes[d] = t.unify(first, second, node.name)
    return tuple(axes)


@rule("aten.prelu")
def prelu(t: Tracer, node: fx.Node) -> Result:
    """One slope, or one a channel (axis 1)."""
    x, slope = t.of(node.args[0]), t.of(node.args[1])
    if len(slope) == 1 and slope[0] and len(x) > 1:
        t.unify(x[1], slope[0], node.name)
    return x


@rule("getitem")
def take(t: Tracer, node: fx.Node) -> Result:
    """One of several results."""
    found = t.axes[node.args[0]]  # type: ignore[index]
    return found[int(node.args[1])] if isinstance(found, list) else None  # type: ignore[arg-type]
