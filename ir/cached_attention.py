"""Attention over a cache as one operator: rotary turn, growth of the cache, grouped heads and softmax, as serving runtimes have it.

`fxpress::cached_attention` takes projections as the linears make them. `fuse_cached_attentions` finds `scaled_dot_product_attention` over caches of the
program, whatever the model's own code between projections and product looks like, and puts the operator in its place.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .edit import Editor
from .evaluation import value_of
from .finders.flow import short_name
from .int8_caches import LIMIT, GrownCache, dequantized, grown_cache
from .nodes import argument
from .shapes import ensure_values, take_place

aten = torch.ops.aten
LONGEST = 4096  # positions of rotary tables, where the program names no limit
_CARRIES = {"aten.view", "aten.reshape", "aten._unsafe_view", "aten.clone", "aten.contiguous", "aten.alias"}
_REPEATS = _CARRIES | {"aten.expand", "aten.unsqueeze"}


@torch.library.custom_op("fxpress::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, cos: Tensor | None, sin: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None, heads: int, groups: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """New tokens attend to those before them and to each other.

    `query: [B, S, heads D]`, `key`, `value: [B, S, groups D]`, past ones `[B, groups, P, D]`, `mask: [B, 1, S, P + S] bool`. `cos`, `sin: [M, D/2]`, by
    position: turn query and key (halves of D, as in GPT-NeoX) by the positions P to P + S. `key_scale`, `value_scale: [1, groups, 1, D]`: caches are int8 of
    these units, new tokens too once they are turned. Returns `[B, S, heads D]` and both caches `[B, groups, P + S, D]`.
    """
    q, k, v = (t.unflatten(2, (count, -1)).transpose(1, 2) for t, count in ((query, heads), (key, groups), (value, groups)))
    if cos is not None and sin is not None:
        past, new = past_key.shape[2], query.shape[1]
        q, k = (_turned(t, cos[past : past + new], sin[past : past + new]) for t in (q, k))
    k, v = _grown(past_key, k, key_scale), _grown(past_value, v, value_scale)
    read = (t if unit is None else t.to(query.dtype) * unit for t, unit in ((k, key_scale), (v, value_scale)))
    wide_k, wide_v = (t.repeat_interleave(heads // groups, 1) for t in read)
    found = F.scaled_dot_product_attention(q, wide_k, wide_v, mask, scale=scale)
    return found.transpose(1, 2).flatten(2), k, v


@cached_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, cos: Tensor | None, sin: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None, heads: int, groups: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, held, past, width = past_key.shape
    grown = [batch, held, past + query.shape[1], width]
    return torch.empty_like(query), past_key.new_empty(grown), past_value.new_empty(grown)


def _grown(past: Tensor, new: Tensor, unit: Tensor | None) -> Tensor:
    return torch.cat([past, new if unit is None else (new / unit).round().clamp(-LIMIT - 1, LIMIT).to(past.dtype)], 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@dataclass(frozen=True)
class _Found:
    """One attention over caches: its operands as the operator takes them, and what it replaces."""

    attention: fx.Node
    keys: GrownCache
    values: GrownCache
    query: fx.Node
    key: fx.Node
    value: fx.Node
    tables: tuple[fx.Node, fx.Node] | None


def fuse_cached_attentions(editor: Editor, *, rotary_multiple: int = 2, multiple: int = 1) -> dict[str, str]:
    """Put the operator where it fits; returns, for every other attention, its node's name and the reason.

    It takes heads whose width is a `multiple`, and turns by itself only those of a multiple of `rotary_multiple`; others come turned.
    """
    program = editor.program
    ensure_values(program)
    left, tables = {}, _Tables(editor)
    for node in [n for n in program.graph.nodes if short_name(n) == "aten.scaled_dot_product_attention"]:
        found = _find(node, program.cache_nodes, tables, rotary_multiple, multiple)
        if isinstance(found, str):
            left[node.name] = found
        else:
            _replace(editor, found, tables)
    return left


def _find(node: fx.Node, caches: frozenset[fx.Node], tables: _Tables, rotary_multiple: int, multiple: int) -> _Found | str:
    query, key, value = (_node(argument(node, a)) for a in ("query", "key", "value"))
    keys, values = (grown_cache(dequantized(_source(n, _REPEATS)), caches) for n in (key, value))
    mask = argument(node, "attn_mask")
    if keys is None or values is None:
        return "its keys and values are no grown cache of the program"
    if (keys.scale is None) is not (values.scale is None):
        return "one of its caches is in 8 bits, the other is not"
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype is not torch.bool or mask.meta["val"].dim() != 4:
        return "it has no boolean mask of four axes"
    widths = {int(n.meta["val"].shape[-1]) for n in (query, keys.grown, values.grown)}
    if len(widths) > 1 or argument(node, "dropout_p") or argument(node, "is_causal"):
        return f"its heads are of widths {sorted(widths)}" if len(widths) > 1 else "it drops or masks by itself"
    (width,) = widths
    if width % multiple:
        return f"its heads are {width} wide, which is no multiple of {multiple}"
    q, k = _rotated(query), _rotated(keys.new)
    if q and k and q[1:] == k[1:] and width % rotary_multiple == 0 and all(tables.by_position(t) is not None for t in q[1:]):
        return _Found(node, keys, values, q[0], k[0], values.new, q[1:])
    return _Found(node, keys, values, query, keys.new, values.new, None)


def _rotated(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """`x, cos, sin` of `x cos + [-x_high, x_low] sin`."""
    products = [_node(a) for a in node.args] if short_name(node) == "aten.add" and len(node.args) == 2 else []
    if len(products) != 2 or any(short_name(p) != "aten.mul" for p in products):
        return None
    (x, cos), (swapped, sin) = (tuple(map(_node, p.args)) for p in products)
    halves: Any = swapped.args[0] if short_name(swapped) == "aten.cat" else ()
    if len(halves) != 2 or short_name(halves[0]) != "aten.neg":
        return None
    high, low = halves[0].args[0], halves[1]
    half = x.meta["val"].shape[-1] // 2
    cuts = [(s.args[0], s.args[1] % 4, s.args[2]) for s in (high, low) if short_name(s) == "aten.slice"]
    cos, sin = (_source(t, {"aten.unsqueeze"}) for t in (cos, sin))
    return (x, cos, sin) if cuts == [(x, 3, half), (x, 3, 0)] and low.args[3] == half else None


def _source(node: fx.Node, through: set[str]) -> fx.Node:
    while short_name(node) in through:
        node = _node(node.args[0])
    return node


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


class _Tables:
    """Rotary tables by position, each computed and stored once."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._made: dict[fx.Node, Tensor | None] = {}
        self._longest = editor.program.inputs.longest("new") or LONGEST

    def by_position(self, node: fx.Node) -> Tensor | None:
        """`[M, D/2]`: the table's first half, if the second one repeats it and it is made from positions alone."""
        if node not in self._made:
            self._made[node] = self._table(node)
        return self._made[node]

    def stored(self, name: str, node: fx.Node | None, like: fx.Node) -> fx.Node | None:
        """A read of the table by position at the graph's insertion point; None for no table."""
        table = None if node is None else self.by_position(node)
        return None if node is None or table is None else self._editor.stored(f"{name}_{node.name}", table, like)

    def _table(self, node: fx.Node) -> Tensor | None:
        try:
            table = value_of(self._editor.program, node, self._given)
        except LookupError:
            return None
        rows = table.flatten(0, -2)
        half = rows.shape[-1] // 2
        return rows[:, :half].contiguous() if len(rows) == self._longest and torch.equal(rows[:, :half], rows[:, half:]) else None

    def _given(self, node: fx.Node) -> Tensor | None:
        """All positions, where the node is some."""
        known = node.meta.get("val")
        positions = isinstance(known, Tensor) and known.dtype is torch.int64 and known.dim() == 2
        return torch.arange(self._longest).unsqueeze(0) if positions else None


def _replace(editor: Editor, found: _Found, tables: _Tables) -> None:
    graph, node = editor.program.graph, found.attention
    scale, heads = argument(node, "scale"), found.query.meta["val"].shape[1]
    with graph.inserting_before(node):
        stored = [tables.stored(f"rotary_{n}", t, node) for n, t in zip(("cos", "sin"), found.tables or (None, None), strict=True)]
        flat = [_flat(graph, n) for n in (found.query, found.key, found.value)]
        caches = (found.keys, found.values)
        groups = found.keys.past.meta["val"].shape[1]
        arguments = (*flat, *(c.past for c in caches), argument(node, "attn_mask"), *stored, *(c.scale for c in caches), heads, groups)
        width = float(found.query.meta["val"].shape[-1])
        made = _call(graph, torch.ops.fxpress.cached_attention.default, *arguments, width**-0.5 if scale is None else float(scale), like=node)
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(3)]
        for part, value in zip(parts, made.meta["val"], strict=True):
            part.meta["val"] = value
        end = _flat_end(node)
        if end is node:
            wide = _call(graph, aten.unflatten.int, parts[0], 2, [heads, int(width)], like=node)
            parts[0] = _call(graph, aten.transpose.int, wide, 1, 2, like=node)
    end.replace_all_uses_with(parts[0])
    for cache, new in zip(caches, parts[1:], strict=True):
        cache.grown.replace_all_uses_with(new, delete_user_cb=lambda user: user.op == "output")


def _flat(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`[B, heads, S, D] -> [B, S, heads D]`, read before it was taken apart where it was."""
    inner = _node(node.args[0]) if short_name(node) == "aten.transpose" and sorted(a % 4 for a in node.args[1:]) == [1, 2] else None  # type: ignore[operator]
    if inner is not None and short_name(inner) in ("aten.view", "aten.reshape") and _node(inner.args[0]).meta["val"].dim() == 3:
        return _node(inner.args[0])
    return _call(graph, aten.flatten.using_ints, _call(graph, aten.transpose.int, node, 1, 2, like=node), 2, like=node)


def _flat_end(node: fx.Node) -> fx.Node:
    """The node that holds the result as `[B, S, heads D]`, or the attention itself."""
    end, turned = node, False
    while len(end.users) == 1:
        (end,) = end.users
        if short_name(end) == "aten.transpose":
            turned = True
        elif short_name(end) not in _CARRIES:
            break
        if turned and end.meta["val"].dim() == 3:
            return end
    return node


def _call(graph: fx.Graph, target: Any, *arguments: Any, like: fx.Node) -> fx.Node:
    return take_place(graph.call_function(target, arguments), like)
