"""Pairs of weights that trade a positive scale a channel: multiply the producers by `s` and the consumers by `1/s`, and the outputs stay what they are.

Holds where everything between is linear in the channel or positively homogeneous (relu): the invariance behind cross-layer equalisation (Nagel et al.,
arXiv 1906.04721), SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor, fx

from ..atoms import Atom, Axis, leaves
from ..axes import AxisClass, labels
from ..nodes import argument
from ..sites import CONVOLUTIONS, SiteKind, WeightSite
from ..weights import alias_classes
from .attention import Attention
from .flow import ATTENTION, SAME, Flow, short_name, stored_name
from .norms import ConvNorm, NormLinear

_PASS = SAME | {
    f"aten.{name}" for name in (
        "relu", "leaky_relu", "neg", "abs", "mean", "sum", "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "max_pool1d",
        "max_pool2d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
        "repeat", "repeat_interleave", "expand_as", "view_as", "reshape_as",
    )
}  # fmt: skip
_CUTS = {"getitem", "aten.slice", "aten.narrow"}
_PRODUCTS = {"aten.matmul", "aten.bmm"}


class ScaleKind(Enum):
    """Where the scale is put."""

    NORM = "norm"  # a norm's weight and bias
    VALUE = "value"  # the value projection of an attention
    LINEAR = "linear"  # a linear site
    CONV = "conv"  # a convolution, or the batch norm behind it


@dataclass(frozen=True)
class ScalePair:
    """`producers` are `(tensor, dim)` to multiply, `consumers` the sites to divide. One scale an index of the product of `classes`, in `index`'s order."""

    kind: ScaleKind
    producers: tuple[tuple[str, int], ...]
    consumers: tuple[WeightSite, ...]
    classes: tuple[AxisClass, ...]
    axes: Mapping[tuple[str, int], Axis] = field(repr=False, compare=False)

    @property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """`(tensor, dim)` of the consumers' weights."""
        return tuple((s.tensors[0], _in_dim(s)) for s in self.consumers)

    @property
    def size(self) -> int:
        """Number of independent scales."""
        total = 1
        for one in self.classes:
            total *= one.size
        return total

    def index(self, tensor: str, dim: int) -> Tensor:
        """Which scale each position of `(tensor, dim)` takes, `[positions] int64`; -1 for positions that stay as they are."""
        axis = self.axes[tensor, dim]
        found = torch.zeros((), dtype=torch.int64)
        known = torch.tensor(True)
        for one in self.classes:
            own = labels(axis, one.atom)
            found, known = found * one.size + own, known & (own >= 0)
        return torch.where(known, found, -1)


@dataclass(frozen=True)
class _Origin:
    """A value whose channels `tensors` scale; `wanted` are the leaves that index them."""

    kind: ScaleKind
    node: fx.Node
    tensors: tuple[tuple[str, int], ...]
    wanted: frozenset[Atom]


def find_scale_pairs(flow: Flow, attentions: tuple[Attention, ...], norms: tuple[NormLinear, ...], conv_norms: tuple[ConvNorm, ...]) -> tuple[ScalePair, ...]:
    """All pairs, in graph order of their producers."""
    readers = _readers(flow)
    origins = sorted(_origins(flow, attentions, norms, conv_norms), key=lambda o: flow.index[o.node])
    found = (_pair(flow, origin, readers) for origin in origins)
    return tuple(pair for pair in found if pair is not None)


def _origins(flow: Flow, attentions: tuple[Attention, ...], norms: tuple[NormLinear, ...], conv_norms: tuple[ConvNorm, ...]) -> Iterator[_Origin]:
    for norm in norms:
        if norm.weight is not None and not norm.offset:
            tensors = [(t, 0) for t in (norm.weight, norm.bias) if t is not None]
            yield _Origin(ScaleKind.NORM, norm.result, tuple(tensors), frozenset(c.atom for c in norm.classes))
    normed = {c.site.node: c for c in conv_norms}
    values = {a.v.node: _value_leaves(a) for a in attentions if a.v is not None}
    for site in flow.sites.values():
        wanted = flow.out_leaves(site)
        if site.kind is SiteKind.EMBEDDING or site.compressed:
            continue
        if site.node in values:
            yield _Origin(ScaleKind.VALUE, site.node, _made_by(site), frozenset(wanted & values[site.node]))
        elif site.node in normed:
            behind = normed[site.node]
            yield _Origin(ScaleKind.CONV, behind.result, tuple((t, 0) for t in (behind.weight, behind.bias) if t is not None), frozenset(wanted))
        else:
            yield _Origin(ScaleKind.CONV if site.kind in CONVOLUTIONS else ScaleKind.LINEAR, site.node, _made_by(site), frozenset(wanted))


def _value_leaves(one: Attention) -> set[Atom]:
    heads = one.heads if one.num_kv_heads == one.num_heads else one.kv_groups
    return {c.atom for c in (heads, *one.v_dims) if c is not None}


def _made_by(site: WeightSite) -> tuple[tuple[str, int], ...]:
    bias = [(site.bias, 0)] if site.bias is not None else []
    return ((site.tensors[0], site.out_axis), *bias)


def _pair(flow: Flow, origin: _Origin, readers: Counter[str]) -> ScalePair | None:
    if not origin.tensors or len(flow.classes(origin.wanted)) != len(origin.wanted) or not origin.wanted:
        return None
    consumers = _consumers(flow, origin)
    if not consumers or any(s.compressed for s in consumers):
        return None
    stored = [*origin.tensors, *((s.tensors[0], _in_dim(s)) for s in consumers)]
    if any(not origin.wanted <= set(leaves(_axis_in(flow, s))) for s in consumers) or any(readers[t] != 1 for t, _ in stored):
        return None
    pair = ScalePair(origin.kind, origin.tensors, tuple(consumers), flow.classes(origin.wanted), {(t, d): _stored_axis(flow, t, d) for t, d in stored})
    return pair if bool((pair.index(*pair.producers[0]) >= 0).any()) else None


def _consumers(flow: Flow, origin: _Origin) -> list[WeightSite] | None:
    """All sites the scaled value ends in; None when it ends elsewhere, or meets an operator that does not commute with the scale."""
    scaled = {origin.node}
    consumers: list[WeightSite] = []
    queue = [(flow.index[u], u) for u in origin.node.users]
    done: set[fx.Node] = set()
    while queue:
        node = heappop(queue)[1]
        if node in done:
            continue
        done.add(node)
        if node in flow.sites and flow.sites[node].data in scaled and _in_dim(flow.sites[node]) >= 0:
            consumers.append(flow.sites[node])
        elif short_name(node) in _CUTS and not origin.wanted <= _leaves_of_results(flow, node):
            continue
        elif _commutes(flow, node, scaled, origin.wanted):
            scaled.add(node)
            for user in node.users:
                heappush(queue, (flow.index[user], user))
        else:
            return None
    return consumers


def _leaves_of_results(flow: Flow, node: fx.Node) -> set[Atom]:
    axes: Any = flow.analysis.axes.get(node)
    results = axes if isinstance(axes, list) else [axes]
    return {leaf for r in results if isinstance(r, tuple) for axis in r for leaf in leaves(axis)}


def _commutes(flow: Flow, node: fx.Node, scaled: set[fx.Node], wanted: frozenset[Atom]) -> bool:
    """Whether scaling the inputs in `scaled` scales the result, which still has the axes."""
    name, inputs = short_name(node), [n for n in node.all_input_nodes if n in scaled]
    if not wanted <= _leaves_of_results(flow, node):
        return False
    if name in _PASS:
        return node.args[0] in scaled
    if name == "aten.mul":
        return len(inputs) == 1 and node.args[0] is not node.args[1]
    if name == "aten.div":
        return node.args[0] in scaled and node.args[1] not in scaled and argument(node, "rounding_mode") is None
    if name in ("aten.add", "aten.sub"):
        return all(a in scaled for a in node.args[:2])
    if name in ATTENTION:
        return len(inputs) == 1 and argument(node, "value") in scaled
    return name in _PRODUCTS and len(inputs) == 1 and node.args[1] in scaled and not wanted & set(_summed(flow, node))


def _summed(flow: Flow, node: fx.Node) -> set[Atom]:
    return set(leaves(flow.analysis.work[node])) - flow.leaves(node)


def _in_dim(site: WeightSite) -> int:
    """Dimension of the weight that meets the data: for depthwise convolutions the first; -1 for other groups and embeddings."""
    if site.groups == 1:
        return -1 if site.kind is SiteKind.EMBEDDING else site.in_axis
    return 0 if site.shape[0] == site.groups else -1


def _axis_in(flow: Flow, site: WeightSite) -> Axis:
    return _stored_axis(flow, site.tensors[0], _in_dim(site))


def _stored_axis(flow: Flow, name: str, dim: int) -> Axis:
    node = next(n for n in flow.nodes if stored_name(n) == name)
    axes: Any = flow.analysis.axes[node]
    return axes[dim]


def _readers(flow: Flow) -> Counter[str]:
    """Per stored tensor the number of nodes that read it or another name of it."""
    aliases = alias_classes(flow.program.graph_module)
    counts: Counter[str] = Counter()
    for node in flow.nodes:
        if node.op == "get_attr":
            counts[aliases.of(str(node.target))[0]] += len(node.users)
    return Counter({name: counts[aliases.of(name)[0]] for n in flow.nodes if (name := stored_name(n)) is not None})
