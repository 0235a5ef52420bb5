"""Convolutions whose groups sum several channels, as ONNX Runtime runs them fast: one branch of depthwise convolutions for each channel of a group, added.

`W: [G, R, *k]` over R G channels in G groups (what a one-way convolution of R terms ends with) has neither a blocked nor a depthwise kernel there. The R
branches do, and the convolutions before it, back to the one that made the channels, split along with it: the arithmetic stays what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

MOST = 4  # branches


def split_group_sums(model: onnx_ir.Model) -> None:
    """Rewrite every such convolution with constant weights and up to four channels a group."""
    import onnx_ir as ir

    for last in [n for n in model.graph if n.op_type == "Conv"]:
        chain = _chain(last)
        if not chain:
            continue
        total: onnx_ir.Value | None = None
        for term in range(_weight(last).shape[1]):
            branch = _branch(model, chain, term)
            if total is None:
                total = branch
                continue
            both = ir.node("Add", inputs=[total, branch])
            model.graph.insert_before(last, both)
            total = both.outputs[0]
        assert total is not None
        old = last.outputs[0]
        total.name, total.type, total.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, total, replace_graph_outputs=True)
        model.graph.remove(list(reversed(chain)), safe=True)


def _chain(last: onnx_ir.Node) -> list[onnx_ir.Node]:
    """The convolutions from the one that makes the channels to `last`; empty where `last` is none whose groups sum, or its channels come from elsewhere."""
    if not _constant(last):
        return []
    outputs, terms = _weight(last).shape[:2]
    if _groups(last) != outputs or not 1 < terms <= MOST:
        return []
    chain = [last]
    while True:
        made = chain[0].inputs[0]
        node = None if made is None or len(made.uses()) > 1 or made.is_graph_output() else made.producer()
        if node is None or node.op_type != "Conv" or not _constant(node):
            return []
        chain.insert(0, node)
        weight, groups = _weight(node), _groups(node)
        if groups == weight.shape[0] and weight.shape[1] == 1:
            continue  # depthwise: each of its channels goes with one branch
        return chain if (weight.shape[0] // groups) % terms == 0 else []


def _branch(model: onnx_ir.Model, chain: list[onnx_ir.Node], term: int) -> onnx_ir.Value:
    """The convolutions of one channel of every group; the bias of the last goes with the first branch."""
    import onnx_ir as ir

    last = chain[-1]
    terms = _weight(last).shape[1]
    flowing = chain[0].inputs[0]
    for node in chain:
        parts = [_constants(node)[0][:, term : term + 1]] if node is last else [c[term::terms] for c in _constants(node)]
        parts += _constants(node)[1:] if node is last and term == 0 else []
        names = [node.inputs[i + 1].name for i in range(len(parts))]
        stored = [ir.val(f"{n}.{term}", const_value=ir.tensor(np.ascontiguousarray(p), name=f"{n}.{term}")) for n, p in zip(names, parts, strict=True)]
        for value in stored:
            model.graph.register_initializer(value)
        groups = _groups(node) if node is chain[0] or node is last else _groups(node) // terms
        attributes = {a.name: a for a in node.attributes.values()} | {"group": ir.AttrInt64("group", groups)}
        conv = ir.Node("", "Conv", inputs=[flowing, *stored], attributes=attributes.values())
        model.graph.insert_before(last, conv)
        flowing = conv.outputs[0]
    assert flowing is not None
    return flowing


def _constant(node: onnx_ir.Node) -> bool:
    import onnx_ir as ir

    return all(value is not None and ir.convenience.get_const_tensor(value) is not None for value in node.inputs[1:])


def _constants(node: onnx_ir.Node) -> list[np.ndarray]:
    """Weight and, where there is one, bias."""
    import onnx_ir as ir

    return [ir.convenience.get_const_tensor(value).numpy() for value in node.inputs[1:] if value is not None]


def _weight(node: onnx_ir.Node) -> np.ndarray:
    return _constants(node)[0]


def _groups(node: onnx_ir.Node) -> int:
    return node.attributes.get_int("group", 1)
