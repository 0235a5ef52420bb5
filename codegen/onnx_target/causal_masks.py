"""Masks of cached attention without their causal half, which GroupQueryAttention knows by itself: what is left is the padding, five operators for fifty."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.edit import Editor
from ...ir.evaluation import value_of
from ...ir.program import Program
from ...ir.shapes import take_place

aten = torch.ops.aten
MASK, IDS = "attention_mask", "input_ids"
TRIED = ({"batch": 1, "new": 5, "past": 0}, {"batch": 2, "new": 1, "past": 4}, {"batch": 2, "new": 3, "past": 4})


def leave_out_causality(editor: Editor) -> None:
    """Let cached attentions read the padding alone, where their mask is that and causality at every size that is tried; the runtime has to add the latter."""
    program = editor.program
    named = dict(zip(program.inputs.keywords, (n for n in program.graph.nodes if n.op == "placeholder"), strict=True))
    readers = defaultdict[fx.Node, list[fx.Node]](list)
    for node in program.graph.nodes:
        if node.target is torch.ops.fxpress.cached_attention.default:
            readers[node.args[5]].append(node)
    for mask, nodes in readers.items() if MASK in named and IDS in named else ():
        if all(_is_causal(program, mask, sizes) for sizes in TRIED):
            padding = _padding(program.graph, named[MASK], named[IDS], nodes[0])
            for node in nodes:
                node.replace_input_with(mask, padding)


def _is_causal(program: Program, mask: fx.Node, sizes: dict[str, int]) -> bool:
    """Whether the mask lets tokens see all that is no padding up to themselves."""
    args, kwargs = program.inputs.sized(sizes)
    held = torch.ones_like(kwargs[MASK])
    held[0, :2] = 0
    placeholders = (n for n in program.graph.nodes if n.op == "placeholder")
    given = dict(zip(placeholders, program.inputs.flatten(args, kwargs | {MASK: held}), strict=True))
    try:
        value = value_of(program, mask, given.get)
    except LookupError:
        return False
    causal = torch.ones(sizes["new"], held.shape[1], dtype=torch.bool).tril(sizes["past"])
    return isinstance(value, Tensor) and torch.equal(value, (causal & held.bool()[:, None, None, :]).expand_as(value))


def _padding(graph: fx.Graph, mask: fx.Node, ids: fx.Node, before: fx.Node) -> fx.Node:
    """`[B, 1, S, P + S] bool` of `mask: [B, P + S]`."""

    def call(target: Any, *arguments: Any, **options: Any) -> fx.Node:
        return take_place(graph.call_function(target, arguments, options), before)

    with graph.inserting_before(before):
        kept = call(aten._to_copy.default, mask, dtype=torch.bool)
        wide = call(aten.unsqueeze.default, call(aten.unsqueeze.default, kept, 1), 2)
        return call(aten.expand.default, wide, [-1, -1, call(aten.sym_size.int, ids, 1), -1])
