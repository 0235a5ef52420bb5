"""Operators that multiply and sum: linears, matrix products, attention, einsum, compressed sites."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..atoms import Axis, MisalignedError, size_of
from ..axes import Result, Tracer
from ..formats.base import parse_format
from ..nodes import argument
from .registry import broadcast, rule


@rule("aten.linear")
def linear(t: Tracer, node: fx.Node) -> Result:
    """`x [..., K]`, `weight [N, K]`, `bias [N]`."""
    x, weight, bias = (t.of(argument(node, a)) for a in ("input", "weight", "bias"))
    t.unify(x[-1], weight[-1], node.name)
    for axis in bias:
        t.unify(weight[0], axis, node.name)
    out = (*x[:-1], *weight[:-1])
    t.contract(node, (*out, x[-1]), x[-1], (argument(node, "input"), argument(node, "weight")))
    return out


@rule("aten.addmm", "aten.baddbmm")
def add_product(t: Tracer, node: fx.Node) -> Result:
    """`self + a [.., M, K] @ b [.., K, N]`."""
    names = ("mat1", "mat2") if argument(node, "mat1") is not None else ("batch1", "batch2")
    product = _product(t, node, argument(node, names[0]), argument(node, names[1]))
    return broadcast(t, node, product, t.of(argument(node, "self")))


@rule("aten.mm", "aten.bmm", "aten.matmul")
def matrix_product(t: Tracer, node: fx.Node) -> Result:
    """`a [..., M, K] @ b [..., K, N]`, batch axes broadcast."""
    return _product(t, node, node.args[0], node.args[1])


def _product(t: Tracer, node: fx.Node, left: Any, right: Any) -> tuple[Axis, ...]:
    a, b = t.of(left), t.of(right)
    if not a or not b:
        raise MisalignedError
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    shared = t.unify(a[-1], b[-2] if len(b) > 1 else b[0], node.name)
    out = (*broadcast(t, node, a[:-2], b[:-2]), *rows, *columns)
    t.contract(node, (*out, shared), shared, (left, right))
    return out


@rule("aten.scaled_dot_product_attention", "aten._scaled_dot_product_flash_attention_for_cpu")
def attention(t: Tracer, node: fx.Node) -> Result:
    """`query [.., H, L, E]`, `key [.., G, S, E]`, `value [.., G, S, V]`, `attn_mask [.., L, S]`; with `enable_gqa` H is G groups of equal size."""
    q, k, v = (t.of(argument(node, a)) for a in ("query", "key", "value"))
    mask = t.of(argument(node, "attn_mask"))
    if argument(node, "enable_gqa") and size_of(k[-3]) != size_of(q[-3]):
        members = t.axis(size_of(q[-3]) // size_of(k[-3]))
        k, v = ((*x[:-3], x[-3] + members, *x[-2:]) for x in (k, v))
    batch = broadcast(t, node, q[:-2], k[:-2], v[:-2])
    t.unify(q[-1], k[-1], node.name)
    t.unify(k[-2], v[-2], node.name)
    t.pin(k[-2], f"the softmax of {node.name} goes over it")
    if argument(node, "is_causal"):
        t.pin(q[-2], f"{node.name} is causal along it")
    broadcast(t, node, (*batch, q[-2], k[-2]), mask)
    t.scales.append((node, q[-1]))
    t.contract(node, (*batch, q[-2], k[-2], q[-1]), q[-1], (argument(node, "query"), argument(node, "key")))
    out = (*batch, q[-2], v[-1])
    return out if not isinstance(node.meta["val"], (tuple, list)) else [out, *t.pinned(node, f"statistics of {node.name}")[1:]]


@rule("aten.einsum")
def einsum(t: Tracer, node: fx.Node) -> Result:
    """Equations of plain letters."""
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left:
        raise MisalignedError
    named: dict[str, Axis] = {}
    for term, operand in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        for letter, axis in zip(term, t.of(operand), strict=True):
            if size_of(named.get(letter, ())) == 1:
                named[letter] = axis
            elif size_of(axis) != 1:
                t.unify(named[letter], axis, node.name)
    t.contract(node, tuple(named.values()), sum((a for letter, a in named.items() if letter not in right), ()), node.args[1])  # type: ignore[arg-type]
    return tuple(named[letter] for letter in right)


@rule("fxpress.linear", "fxpress.conv", "fxpress.embedding")
def compressed(t: Tracer, node: fx.Node) -> Result:
    """The weight is stored packed: what it contracts and what it makes cannot shrink; the axes before a linear's pass."""
    why = f"{node.name} holds a compressed weight; prune before quantizing"
    if t.prefixes and node.target._schema.name == "fxpress::linear" and parse_format(str(node.args[3])).takes_prefixes:  # type: ignore[union-attr]
        return _packed_linear(t, node, why)
    x, shape = t.of(node.args[0]), node.meta["val"].shape
    axis = 1 if node.target._schema.name == "fxpress::conv" else len(x) - 1  # type: ignore[union-attr]
    out = list(t.pinned(node, why))
    if node.target._schema.name != "fxpress::embedding":  # type: ignore[union-attr]
        t.pin(x[axis], why)
        out = [a if i != axis and len(shape) == len(x) and size_of(a) == size_of(o) else o for i, (a, o) in enumerate(zip(x, out, strict=True))]
    for stored in [n for n in node.all_input_nodes if n.op == "get_attr"]:
        for one in t.of(stored):
            t.pin(one, why)
    return tuple(out)


def _packed_linear(t: Tracer, node: fx.Node, why: str) -> Result:
    """A linear over a weight `[N, K]` that can be cut to prefixes; its stored tensors follow by format (`resize`), not by their axes."""
    x, payload, bias, _, shape = node.args
    out, summed = (t.axis(int(size)) for size in shape)  # type: ignore[union-attr, arg-type]
    t.unify(t.of(x)[-1], summed, node.name)
    if bias is not None:
        t.unify(t.of(bias)[0], out, node.name)
    for stored in payload:  # type: ignore[union-attr]
        for one in t.of(stored):
            t.pin(one, why)
    for place, axis in enumerate((out, summed)):
        t.constant(node, (4, place), axis)
    t.packed[node] = (out, summed)
    t.work[node] = (*(a for axis in t.of(x) for a in axis), *out)
    return (*t.of(x)[:-1], out)
