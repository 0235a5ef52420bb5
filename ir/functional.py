"""What torch.export traced as a functional graph, without tracing it again: operators that may return their input or a copy become the one they were.

`run_decompositions({})` does the same by a second trace, which takes as long as the first; for a decoder with symbolic sizes that is most of a minute.
Where an operator is met that only that trace can treat (one that writes, or that has to be taken apart), there is no short way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .finders.flow import short_name
from .nodes import argument
from .shapes import call_fake

aten = torch.ops.aten


def functional(exported: torch.export.ExportedProgram) -> fx.GraphModule | None:
    """The unlifted graph module, or None where the graph has to be traced again."""
    if not all(_simple(n) for n in exported.graph.nodes):
        return None
    unlifted = exported.module(check_guards=False)
    if not isinstance(unlifted, fx.GraphModule):
        return None
    for node in list(unlifted.graph.nodes):
        rule = _RULES.get(short_name(node))
        if rule is not None:
            node.replace_all_uses_with(rule(unlifted.graph, node))
            unlifted.graph.erase_node(node)
    return unlifted


def _simple(node: fx.Node) -> bool:
    """Whether the node's operator stays as it is, or has a rule."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
        return node.op != "call_module"
    if short_name(node) == "aten.flatten" and not (isinstance(_value(node), Tensor) and isinstance(_value(node).shape[_merged(node)], int)):
        return False
    if short_name(node) == "aten.dropout" and node.args[2]:
        return False
    if short_name(node) in _RULES:
        return isinstance(_value(node), Tensor) and isinstance(_value(node.args[0]), Tensor) and _value(node).device == _value(node.args[0]).device
    return not op._schema.is_mutable and not _taken_apart(op)


def _taken_apart(op: torch._ops.OpOverload) -> bool:
    """Whether the second trace would replace this operator by others."""
    try:
        from torch._export.utils import _is_cia_op, _is_preservable_cia_op
    except ImportError:
        return True
    return bool(_is_cia_op(op) and not _is_preservable_cia_op(op))


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _same_memory(node: fx.Node) -> bool:
    """Whether the result is its first operand's memory, in the same type."""
    old, new = _value(node.args[0]), _value(node)
    return bool(old.dtype == new.dtype and old.untyped_storage()._cdata == new.untyped_storage()._cdata)


def _to(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if _same_memory(node):
        return _operand(node)
    return _call(graph, node, aten._to_copy.default, (node.args[0],), {"dtype": _value(node).dtype})


def _reshape(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return _viewed(graph, node, _sizes(node))


def _viewed(graph: fx.Graph, node: fx.Node, sizes: list[Any]) -> fx.Node:
    if _same_memory(node):
        return _call(graph, node, aten.view.default, (node.args[0], sizes))
    copied = _call(graph, node, aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format})
    copied.meta["val"] = call_fake(copied)
    return _call(graph, node, aten._unsafe_view.default, (copied, sizes))


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes asked for, one that was left open filled in where it is known."""
    asked: Any = node.args[1]
    return [made if size == -1 and isinstance(made, int) else size for size, made in zip(asked, _value(node).shape, strict=True)]


def _merged(node: fx.Node) -> int:
    """The axis that a flatten makes of several."""
    return int(argument(node, "start_dim")) % max(1, _value(node.args[0]).dim())


def _flatten(graph: fx.Graph, node: fx.Node) -> fx.Node:
    place, shape = _merged(node), _value(node).shape
    lost = _value(node.args[0]).dim() - len(shape)
    with graph.inserting_before(node):
        sizes = [s if isinstance(s, int) else _size(graph, node, i if i < place else i + lost) for i, s in enumerate(shape)]
    return _viewed(graph, node, sizes)


def _size(graph: fx.Graph, node: fx.Node, axis: int) -> fx.Node:
    """The size of a free axis of the node's operand, asked for already or here."""
    size = _value(node.args[0]).shape[axis]
    for other in graph.nodes:
        if other is node:
            break
        if short_name(other) == "aten.sym_size" and isinstance(_value(other), torch.SymInt) and _value(other).node.expr == size.node.expr:
            return other
    made = graph.call_function(aten.sym_size.int, (node.args[0], axis))
    made.meta["val"] = size
    return made


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return _operand(node) if _same_memory(node) else _call(graph, node, aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format})


def _dropout(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return _call(graph, node, aten.clone.default, (node.args[0],))


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _call(graph: fx.Graph, old: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    with graph.inserting_before(old):
        node = graph.call_function(target, args, kwargs or {})
    node.meta = dict(old.meta)  # the value, too: what is compared with it next may share its memory
    return node


_RULES: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "aten.to": _to, "aten.reshape": _reshape, "aten.contiguous": _contiguous, "aten.dropout": _dropout, "aten.flatten": _flatten,
}  # fmt: skip
