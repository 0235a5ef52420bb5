"""Rotary tables of one attention's own, so that each of its key heads can keep rotary pairs of its own.

Language models share one pair of cosine and sine tables between all layers and heads, which ties their rotary pairs into one axis class. Here every product
with a table gets `table[..., index]`, `index: [heads, D] int64` being a buffer of the attention: the identity at first, so the program computes what it did.
Whoever reorders rows of the query and key reorders the index with them (`passes.head_bases`); whoever resizes the class keeps part of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from .axes import AxisClass, hint, labels
from .finders.attention import Attention
from .finders.flow import Flow, short_name
from .shapes import call_fake
from .sites import WeightSite

if TYPE_CHECKING:
    from .edit import Editor

aten = torch.ops.aten


@dataclass(frozen=True)
class Turn:
    """A product of an activation that `site` made with a rotary `table`; its heads lie along dimension `head` (None: there is only one)."""

    node: fx.Node
    table: fx.Node
    site: WeightSite
    heads: int
    head: int | None


def index_name(site: WeightSite) -> str:
    """The buffer `[heads, D]` that says which column of the rotary tables each channel of the site's heads turns by."""
    return f"{site.name}.rotary_index"


def find_turns(flow: Flow, attention: Attention, pair: AxisClass) -> list[Turn] | str:
    """The products with tables on the way from query and key projection to the scores, or the reason why they cannot have tables of their own."""
    assert attention.q is not None and attention.k is not None
    found: list[Turn] = []
    for site, heads in ((attention.q, attention.num_heads), (attention.k, attention.num_kv_heads)):
        turns = [_turn(flow, node, site, heads, pair, attention) for node in flow.walk_on(site.node, flow.is_end)[0] if short_name(node) == "aten.mul"]
        wrong = next((t for t in turns if isinstance(t, str)), None)
        if wrong is not None:
            return wrong
        mine = [t for t in turns if isinstance(t, Turn)]
        if not mine:
            return f"no product with a rotary table behind {site.name}"
        found += mine
    return found


def _turn(flow: Flow, node: fx.Node, site: WeightSite, heads: int, pair: AxisClass, attention: Attention) -> Turn | str | None:
    tables = [n for n in node.all_input_nodes if n not in flow.live and isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim() >= 2]
    if len(tables) != 1 or not tables[0].meta["val"].is_floating_point() or pair.atom not in flow.leaves(tables[0]):
        return None
    table, data = tables[0], flow.live_inputs(node)[0]
    if not bool((labels(flow.analysis.axes[table][-1], pair.atom) >= 0).all()):
        return f"the rotary table {table.name} holds more than the rotary pairs"
    head = _head_dim(flow, data, attention) if heads > 1 else None
    if heads > 1 and (head is None or hint(data.meta["val"].shape[head]) != heads):
        return f"the heads of {data.name} could not be told from its shape"
    place = None if head is None else head - (data.meta["val"].dim() - table.meta["val"].dim())
    if place is not None and (place < -1 or place >= table.meta["val"].dim() - 1 or (place >= 0 and hint(table.meta["val"].shape[place]) != 1)):
        return f"the rotary table {table.name} differs between heads"
    return Turn(node, table, site, heads, place)


def _head_dim(flow: Flow, data: fx.Node, attention: Attention) -> int | None:
    atoms = {c.atom for c in (attention.heads, attention.kv_groups) if c is not None}
    axes = flow.analysis.axes[data]
    return next((d for d, axis in enumerate(axes) if any(bool((labels(axis, a) >= 0).any()) for a in atoms)), None)


def own_tables(editor: Editor, turns: list[Turn]) -> None:
    """Let every product read the columns of its table that its site's index names; all identities until someone sets the index."""
    from .edit import record

    graph = editor.program.graph
    made: dict[tuple[fx.Node, str], fx.Node] = {}
    for turn in turns:
        key = (turn.table, turn.site.name)
        if key not in made:
            with graph.inserting_before(turn.node):
                made[key] = _gathered(editor, turn)
            editor.added(record(made[key]), "rotary table of this attention's own")
        turn.node.replace_input_with(turn.table, made[key])


def _gathered(editor: Editor, turn: Turn) -> fx.Node:
    graph, rank, width = editor.program.graph, turn.table.meta["val"].dim(), hint(turn.table.meta["val"].shape[-1])
    index = editor.stored(index_name(turn.site), torch.arange(width).repeat(turn.heads, 1), like=turn.table)

    def call(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = call_fake(node)
        return node

    taken = call(aten.index.Tensor, turn.table, [None] * (rank - 1) + [index])  # [.., heads, D]
    if turn.head is None:
        return call(aten.select.int, taken, rank - 1, 0)
    if turn.head >= 0:
        taken, rank = call(aten.select.int, taken, turn.head, 0), rank - 1
    order = [*range(rank - 1)]
    order.insert(max(turn.head, 0), rank - 1)
    return call(aten.permute.default, taken, [*order, rank])
