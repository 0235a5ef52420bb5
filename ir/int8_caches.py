"""Caches of keys and values in 8 bits: symmetric int8, one scale for each channel of each head, quantized as tokens come and dequantized where they are read.

The graph says what the serving runtime does: new keys and values are divided by their scales, rounded half to even and held; attention reads what is held
times the scales, the new tokens' own included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .edit import Editor, record
from .finders.flow import short_name
from .program import Program
from .shapes import call_fake, take_place

aten = torch.ops.aten
LIMIT = 127


@dataclass(frozen=True)
class GrownCache:
    """`grown = cat([past, new], 2)`, returned for the next call; in 8 bits `new` is quantized by `scale: [1, G, 1, D]` first."""

    past: fx.Node
    grown: fx.Node
    new: fx.Node
    scale: fx.Node | None


def grown_caches(program: Program) -> list[GrownCache]:
    """Every cache that grows by concatenation, in graph order."""
    found = (grown_cache(n, program.cache_nodes) for n in program.graph.nodes if short_name(n) == "aten.cat")
    return [f for f in found if f is not None]


def grown_cache(node: fx.Node, caches: frozenset[fx.Node]) -> GrownCache | None:
    """The cache that `node` grows, if it does."""
    parts: Any = node.args[0] if short_name(node) == "aten.cat" else ()
    if len(parts) != 2 or parts[0] not in caches:
        return None
    past, new = parts
    if new.meta["val"].dtype is not torch.int8:
        return GrownCache(past, node, new, None)
    chain = [new]
    for name in ("aten._to_copy", "aten.clamp", "aten.round"):
        if short_name(chain[-1]) != name:
            return None
        chain.append(chain[-1].args[0])
    divided = chain[-1]
    return GrownCache(past, node, divided.args[0], divided.args[1]) if short_name(divided) == "aten.div" else None


def dequantized(node: fx.Node) -> fx.Node:
    """The cache in 8 bits that `node` reads times its scale; any other node itself."""
    wide = node.args[0] if short_name(node) == "aten.mul" else node
    if isinstance(wide, fx.Node) and short_name(wide) == "aten._to_copy" and isinstance(held := wide.args[0], fx.Node):
        return held if held.meta["val"].dtype is torch.int8 else node
    return node


def quantize_caches(editor: Editor, scales: dict[fx.Node, Tensor], why: str) -> None:
    """Hold the caches with these placeholders in 8 bits; `scales: [G, D]`, by placeholder."""
    program = editor.program
    mine = [c for c in grown_caches(program) if c.past in scales]
    before = [[record(n) for n in (one.past, one.grown)] for one in mine]
    _hold_bytes(program, set(scales))
    for one in mine:
        _quantize(editor, one, scales[one.past])
    for one, old in zip(mine, before, strict=True):
        for was, node in zip(old, (one.past, one.grown), strict=True):
            editor.retyped(was, node, why)


def _hold_bytes(program: Program, wanted: set[fx.Node]) -> None:
    """Let the placeholders and examples of these caches be int8."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    leaves, spec = pytree.tree_flatten((program.inputs.args, program.inputs.kwargs))
    leaves = [torch.zeros_like(v, dtype=torch.int8) if n in wanted else v for n, v in zip(placeholders, leaves, strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    program.inputs = replace(program.inputs, args=args, kwargs=kwargs)
    for node in wanted:
        with node.meta["val"].fake_mode:
            node.meta["val"] = node.meta["val"].to(torch.int8)


def _quantize(editor: Editor, one: GrownCache, scale: Tensor) -> None:
    graph, new, grown = editor.program.graph, one.new, one.grown
    kind = new.meta["val"].dtype
    with graph.inserting_before(grown):
        stored = editor.stored(f"{one.past.name}_scale", scale.to(kind)[None, :, None, :], new)
        x = take_place(graph.call_function(aten.div.Tensor, (new, stored)), new)
        x = take_place(graph.call_function(aten.clamp.default, (take_place(graph.call_function(aten.round.default, (x,)), new), -LIMIT - 1, LIMIT)), new)
        x = take_place(graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.int8}), new)
    grown.args = ([one.past, x], *grown.args[1:])
    with graph.inserting_after(grown):
        wide = graph.call_function(aten._to_copy.default, (grown,), {"dtype": kind})
    with graph.inserting_after(wide):
        value = graph.call_function(aten.mul.Tensor, (wide, stored))
    grown.meta["val"] = call_fake(grown)
    take_place(wide, grown)
    take_place(value, grown)
    grown.replace_all_uses_with(value, delete_user_cb=lambda user: user.op != "output" and user is not wide)
