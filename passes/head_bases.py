"""Exact changes of basis inside attention heads, after which the channels that matter least come last and can be cut off.

A head's values may be multiplied by any invertible R if the output projection undoes it; queries by A and keys by B where A^T B is the identity, as long as
nothing that depends on the position stands between (rotary embeddings); rotary pairs may only change places, and their tables with them. Without a cut
the program computes what it did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.axes import AxisClass
from ..ir.edit import Editor
from ..ir.heads import Heads, positions
from ..ir.nodes import get_tensor
from ..ir.rotary import index_name
from ..ir.sites import WeightSite


def change_values(editor: Editor, heads: Heads, one: AxisClass, forward: Tensor, back: Tensor, why: str) -> None:
    """Values times `forward: [H, D, D]`, output columns times `back: [H, D, D]`, the inverses."""
    rows, columns = heads.value_rows(one), heads.output_columns(one)
    site, out = heads.attention.v, heads.attention.o
    assert site is not None and out is not None
    _mix_rows(editor, site, [(rows, forward)], why)
    matrix = out.matrix().double()
    mixed = matrix.clone()
    for h in range(heads.count):
        for g in range(heads.members):
            mixed[:, columns[h, g]] = matrix[:, columns[h, g]] @ back[h].double()
    editor.set_matrix(out, mixed.to(out.dtype), why)


def change_scores(editor: Editor, heads: Heads, one: AxisClass, query: Tensor, key: Tensor, why: str) -> None:
    """Queries times `query: [H, D, D]`, keys times `key: [H, D, D]`, each the inverse of the other's transpose."""
    q, k = heads.attention.q, heads.attention.k
    assert q is not None and k is not None
    on_queries = [(heads.query_rows(one)[:, g, :, 0], query) for g in range(heads.members)]
    on_keys = [(heads.key_rows(one)[:, :, 0], key)]
    if q == k:
        _mix_rows(editor, q, on_queries + on_keys, why)
    else:
        _mix_rows(editor, q, on_queries, why)
        _mix_rows(editor, k, on_keys, why)


def order_channels(editor: Editor, heads: Heads, one: AxisClass, order: Tensor, why: str) -> None:
    """Index j of the class becomes what index `order[h, j]` (`[H, size]`) was, in every key head h, its queries, and its rotary tables."""
    q, k = heads.attention.q, heads.attention.k
    assert q is not None and k is not None
    moves: dict[str, Tensor] = {}
    for site, rows in ((q, heads.query_rows(one)), (k, heads.key_rows(one).unsqueeze(1))):
        moves.setdefault(site.name, torch.arange(site.rows))
        for h in range(heads.count):
            moves[site.name][rows[h].flatten()] = rows[h][:, order[h]].flatten()
    for site in dict.fromkeys((q, k)):
        move = moves[site.name]
        editor.set_matrix(site, site.matrix()[move], why)
        if site.bias is not None:
            editor.set_bias(site, get_tensor(editor.program.graph_module, site.bias).detach()[move], why)
        _order_index(editor, heads, one, site, order)


def _order_index(editor: Editor, heads: Heads, one: AxisClass, site: WeightSite, order: Tensor) -> None:
    """The site's rotary index `[heads, D]`, where it has one."""
    axes = heads.flow.analysis.tensors.get(index_name(site))
    if axes is None:
        return
    index = get_tensor(editor.program.graph_module, index_name(site))
    rows, columns = positions(axes[0], [heads.kv]), positions(axes[1], [one.atom])
    new = index.clone()
    for h in range(heads.count):
        for row in rows[h].tolist():
            new[row, columns.flatten()] = index[row, columns[order[h]].flatten()]
    editor.set_tensor(index_name(site), new)


def _mix_rows(editor: Editor, site: WeightSite, parts: list[tuple[Tensor, Tensor]], why: str) -> None:
    """Multiply the rows `[H, D]` of every part by its `[H, D, D]`, bias included."""
    matrix = site.matrix().double()
    bias = None if site.bias is None else get_tensor(editor.program.graph_module, site.bias).detach().double()
    mixed, shifted = matrix.clone(), None if bias is None else bias.clone()
    for rows, maps in parts:
        for own, change in zip(rows, maps.double(), strict=True):
            mixed[own] = change @ matrix[own]
            if bias is not None and shifted is not None:
                shifted[own] = change @ bias[own]
    editor.set_matrix(site, mixed.to(site.dtype), why)
    if shifted is not None:
        editor.set_bias(site, shifted.to(site.dtype), why)
