"""Attention: scaled dot products, fused or spelled out, with their projections and head axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..atoms import Atom, leaves, size_of
from ..axes import AxisClass, hint
from ..nodes import argument, get_tensor
from ..sites import WeightSite
from .flow import ATTENTION, Flow, is_add, short_name

_PRODUCTS = {"aten.matmul": (0, 1), "aten.bmm": (0, 1), "aten.baddbmm": (1, 2), "aten.einsum": None}
_NORMS = {"aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm", "aten.mean", "aten.linalg_vector_norm", "aten.norm"}
_SOFTMAX = {"aten.softmax", "aten._softmax", "aten._safe_softmax"}
_COMPARISONS = {"aten.le", "aten.lt", "aten.ge", "aten.gt"}


@dataclass(frozen=True)
class Attention:
    """One attention. `q`, `k`, `v` are the projections (`fused`: some are the same site), `o` the output projection; None where there is none.

    `heads` is the class with one index a query head; with grouped queries one a query head of each group, also called `group_members`, and `kv_groups` is
    the class of key/value heads. `qk_dims` are the classes summed over in the scores, `v_dims` those of the values. `node` makes the result, `scores` are
    the nodes between the first product and the softmax (none for a fused operator).
    """

    q: WeightSite | None
    k: WeightSite | None
    v: WeightSite | None
    o: WeightSite | None
    heads: AxisClass | None
    kv_groups: AxisClass | None
    group_members: AxisClass | None
    qk_dims: tuple[AxisClass, ...]
    v_dims: tuple[AxisClass, ...]
    num_heads: int
    num_kv_heads: int
    rotary: bool
    qk_norm: bool
    cross: bool
    causal: bool
    node: fx.Node = field(repr=False)
    scores: tuple[fx.Node, ...] = field(repr=False)

    @property
    def sites(self) -> tuple[WeightSite, ...]:
        """The projections that exist, each once: query, key, value, output."""
        return tuple(dict.fromkeys(s for s in (self.q, self.k, self.v, self.o) if s is not None))

    @property
    def fused(self) -> bool:
        """Whether one site makes several of query, key and value."""
        made = [s for s in (self.q, self.k, self.v) if s is not None]
        return len(set(made)) < len(made)

    @property
    def qk_dim(self) -> AxisClass | None:
        """The only class of `qk_dims`, or the first."""
        return next(iter(self.qk_dims), None)

    @property
    def v_dim(self) -> AxisClass | None:
        """The only class of `v_dims`, or the first."""
        return next(iter(self.v_dims), None)

    def __str__(self) -> str:
        return f"attention at {self.node.name}"


@dataclass(frozen=True)
class _Anchor:
    """`query`, `key`, `value` operands; `first` makes the scores (or everything), `node` the result; `mask` nodes are added to the scores."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    first: fx.Node
    node: fx.Node
    masks: tuple[fx.Node, ...]
    scores: tuple[fx.Node, ...]
    is_causal: bool


def find_attentions(flow: Flow) -> tuple[Attention, ...]:
    """All attentions in graph order."""
    return tuple(_attention(flow, anchor) for anchor in _anchors(flow))


def _anchors(flow: Flow) -> Iterator[_Anchor]:
    for node in flow.nodes:
        if short_name(node) in ATTENTION:
            query, key, value = (argument(node, a) for a in ("query", "key", "value"))
            mask = argument(node, "attn_mask")
            yield _Anchor(query, key, value, node, node, (mask,) if isinstance(mask, fx.Node) else (), (), bool(argument(node, "is_causal")))
        elif short_name(node) in _SOFTMAX and node in flow.live:
            found = _eager(flow, node)
            if found is not None:
                yield found


def _eager(flow: Flow, softmax: fx.Node) -> _Anchor | None:
    """`matmul -> (scale, mask, add)* -> softmax -> (dropout, cast)* -> matmul`."""
    passed, ends = flow.walk_back(softmax, flow.is_end)
    products = [n for n in ends if flow.mixes(n)]
    ahead, after = flow.walk_on(softmax, flow.is_end)
    results = [n for n in after if flow.mixes(n)]
    if len(products) != 1 or len(results) != 1:
        return None
    operands, second = _operands(products[0]), _operands(results[0])
    if operands is None or second is None:
        return None
    weights = {softmax, *ahead}
    values = [n for n in second if n not in weights]
    if len(values) != 1:
        return None
    masks = [i for n in passed for i in n.all_input_nodes if i not in flow.live]
    return _Anchor(*operands, values[0], products[0], results[0], tuple(masks), tuple(passed), False)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    where = _PRODUCTS.get(short_name(node), ())
    operands: Any = node.args[1] if where is None else [node.args[i] for i in where]
    return (operands[0], operands[1]) if len(operands) == 2 and all(isinstance(o, fx.Node) for o in operands) else None


def _attention(flow: Flow, anchor: _Anchor) -> Attention:
    q, k, v = (_projection(flow, n) for n in (anchor.query, anchor.key, anchor.value))
    o = _output(flow, anchor.node)
    batch, contracted = _axes(flow, anchor)
    heads = batch & (flow.out_leaves(q, v) | flow.in_leaves(o))
    shared = heads - _absent(flow, k, anchor.key, heads)
    grouped = shared != heads
    qk = contracted & flow.out_leaves(q, k)
    values = flow.leaves(anchor.node) & (flow.out_leaves(v) | flow.in_leaves(o)) - heads - _rows(flow, anchor.node)
    query_heads = flow.classes(heads - shared if grouped else heads)
    head = next(iter(query_heads), None)
    path = [*_path(flow, q, anchor.query), *_path(flow, k, anchor.key)]
    return Attention(
        q=q, k=k, v=v, o=o, heads=head, kv_groups=next(iter(flow.classes(shared)), None) if grouped else None, group_members=head if grouped else None,
        qk_dims=flow.classes(qk), v_dims=flow.classes(values), num_heads=size_of(tuple(heads)), num_kv_heads=size_of(tuple(shared)),
        rotary=any(_turns(flow, n) for n in path), qk_norm=any(short_name(n) in _NORMS for n in path), cross=_cross(flow, q, v),
        causal=anchor.is_causal or any(_is_causal(flow, m) for m in anchor.masks), node=anchor.node, scores=anchor.scores,
    )  # fmt: skip


def _projection(flow: Flow, operand: fx.Node) -> WeightSite | None:
    """The nearest site that the operand is computed from and shares an axis with."""
    mine = flow.leaves(operand)
    found = flow.writers(operand)
    return next((s for s in found if flow.out_leaves(s) & mine), next(iter(found), None))


def _output(flow: Flow, node: fx.Node) -> WeightSite | None:
    """The first site that sums over an axis of the result, before anything is added to it."""
    mine = flow.leaves(node)
    ends = flow.walk_on(node, lambda n: flow.is_end(n) or (is_add(n) and len(flow.live_inputs(n)) > 1))[1]
    return next((flow.sites[n] for n in ends if n in flow.sites and flow.in_leaves(flow.sites[n]) & mine), None)


def _axes(flow: Flow, anchor: _Anchor) -> tuple[set[Atom], set[Atom]]:
    """Leaves of the axes that are not summed over in the scores, and of those that are."""
    query: Any = flow.analysis.axes[anchor.query]
    if anchor.first is anchor.node:
        return {leaf for axis in query[:-2] for leaf in leaves(axis)}, set(leaves(query[-1]))
    kept = flow.leaves(anchor.first)
    return kept, set(leaves(flow.analysis.work[anchor.first])) - kept


def _rows(flow: Flow, node: fx.Node) -> set[Atom]:
    axes: Any = flow.analysis.axes[node]
    first = axes[0] if isinstance(axes, list) else axes
    return set(leaves(first[-2]))


def _path(flow: Flow, site: WeightSite | None, end: fx.Node) -> list[fx.Node]:
    return [] if site is None else flow.path_between(site, end)


def _absent(flow: Flow, site: WeightSite | None, operand: fx.Node, heads: set[Atom]) -> set[Atom]:
    """Head leaves that some value between the key's projection and the attention does not have: they come in by repeating key heads."""
    values = [operand, *_path(flow, site, operand)]
    return {leaf for n in values if isinstance(flow.analysis.axes.get(n), tuple) for leaf in heads - flow.leaves(n)}


def _turns(flow: Flow, node: fx.Node) -> bool:
    """Whether the node multiplies an activation by a table of at least two axes: a rotation by positions."""
    tables = [n for n in node.all_input_nodes if n not in flow.live and isinstance(n.meta.get("val"), Tensor)]
    return short_name(node) == "aten.mul" and any(sum(hint(s) != 1 for s in t.meta["val"].shape) >= 2 for t in tables)


def _cross(flow: Flow, q: WeightSite | None, v: WeightSite | None) -> bool:
    """Whether queries and values come from different streams."""
    if q is None or v is None or q.data is v.data:
        return False
    return not (set(_sources(flow, q.data)) & set(_sources(flow, v.data)))


def _sources(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """Where the value comes from: the nearest sites, products, inputs, and sums of two activations."""
    passed, ends = flow.walk_back(node, lambda n: flow.is_end(n) or n.op == "placeholder" or (is_add(n) and len(flow.live_inputs(n)) > 1))
    return ends or passed[-1:]


def _is_causal(flow: Flow, mask: fx.Node) -> bool:
    """Whether the mask compares two ranges of positions, is cut to a triangle, or is a stored triangle."""
    nodes = [*flow.members(flow.above[flow.index[mask]]), mask]
    return any(_makes_triangle(flow, n) for n in nodes)


def _makes_triangle(flow: Flow, node: fx.Node) -> bool:
    if short_name(node) in ("aten.tril", "aten.triu"):
        return True
    if short_name(node) in _COMPARISONS:
        return len(node.all_input_nodes) == 2 and all(_has_range(flow, n) for n in node.all_input_nodes)
    return node.op == "get_attr" and _is_triangle(get_tensor(flow.program.graph_module, str(node.target)))


def _has_range(flow: Flow, node: fx.Node) -> bool:
    nodes = [*flow.members(flow.above[flow.index[node]]), node]
    return any(short_name(n) == "aten.arange" for n in nodes)


def _is_triangle(stored: Tensor) -> bool:
    if stored.dim() < 2 or stored.shape[-1] != stored.shape[-2] or stored.shape[-1] < 2 or stored[..., 0, 0].numel() != 1:
        return False
    square = stored.reshape(stored.shape[-2:])
    upper = torch.ones_like(square, dtype=torch.bool).triu(1)
    return square[upper].unique().numel() == 1 and square[~upper].unique().numel() == 1 and bool(square[0, 1] != square[0, 0])
