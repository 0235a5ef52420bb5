"""Residual streams and the blocks that add to them.

A block is an `add` of a *stream* and a *branch*: both come from one activation, the stream without passing a weight site, the branch through at least one.
Where both pass sites (a projection shortcut), the shorter way is the stream, and the block cannot be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, fx

from ..atoms import Atom, leaves
from ..axes import AxisClass
from ..nodes import argument
from ..sites import CONVOLUTIONS, WeightSite
from .attention import Attention
from .feed_forward import FeedForward
from .flow import LINEAR, Flow, is_add


class BlockKind(Enum):
    """What a block computes; the first that holds."""

    ATTENTION = "attention"
    CONVOLUTION = "convolution"
    FEED_FORWARD = "feed_forward"
    OTHER = "other"


@dataclass(frozen=True)
class Sum:
    """An `add` that continues a stream. `fork` is the activation both operands come from; `region` are the nodes of the branch, as a bit mask."""

    node: fx.Node
    stream: fx.Node
    branch: fx.Node
    fork: fx.Node
    region: int = field(repr=False)
    refusal: str = ""


@dataclass(frozen=True)
class Block:
    """A residual block: `node` adds `branch` to `stream`. Replacing `node` by `stream` drops it where `droppable`; `why_not` says why otherwise."""

    layer: int
    index: int
    kind: BlockKind
    sites: tuple[WeightSite, ...]
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    residual: int
    path: str
    why_not: str
    node: fx.Node = field(repr=False)
    stream: fx.Node = field(repr=False)
    branch: fx.Node = field(repr=False)

    @property
    def droppable(self) -> bool:
        """Whether replacing `node` by `stream` gives a program of the same shapes."""
        return not self.why_not

    def __str__(self) -> str:
        return f"block {self.index} of layer {self.layer} ({self.kind.value} at {self.node.name})"


@dataclass(frozen=True)
class Residual:
    """A stream: it starts at `source`, `adds` write it. `normed`: layer or root-mean-square norms go over its classes."""

    index: int
    classes: tuple[AxisClass, ...]
    writers: tuple[WeightSite, ...]
    normed: bool
    source: fx.Node = field(repr=False)
    adds: tuple[fx.Node, ...] = field(repr=False)

    @property
    def transformer_like(self) -> bool:
        """Whether its classes get the role `RESIDUAL` (and not `CONV_OUT`): it is normalised across its axis, or only linear sites write it."""
        return self.normed or all(s.kind in LINEAR for s in self.writers)

    def __str__(self) -> str:
        return f"residual stream {self.index}"


def find_sums(flow: Flow, attentions: tuple[Attention, ...]) -> tuple[Sum, ...]:
    """The adds that continue a stream, in graph order."""
    scores = {n for a in attentions for n in a.scores}
    adds = [n for n in flow.nodes if is_add(n) and n not in scores and len(flow.live_inputs(n)) == 2]
    plain = [s for n in adds if (s := _identity(flow, n)) is not None]
    inside = 0
    for one in plain:
        inside |= one.region
    found = {s.node for s in plain}
    projected = [s for n in adds if n not in found and not inside >> flow.index[n] & 1 and (s := _projected(flow, n)) is not None]
    return tuple(sorted((*plain, *projected), key=lambda s: flow.index[s.node]))


def _identity(flow: Flow, node: fx.Node) -> Sum | None:
    a, b = flow.live_inputs(node)
    choices = [s for s in (_with_stream(flow, node, a, b), _with_stream(flow, node, b, a)) if s is not None]
    return next((s for s in choices if s.fork is s.stream), next(iter(choices), None))


def _with_stream(flow: Flow, node: fx.Node, stream: fx.Node, branch: fx.Node) -> Sum | None:
    """The sum, when the stream comes without a site from an activation that the branch comes from through a site, and the branch is for this sum alone."""
    if len(branch.users) != 1:
        return None
    passed, ends = flow.walk_back(stream, flow.is_end)
    for fork in (*passed, *ends):
        if flow.depends(branch, fork):
            region = _region(flow, stream, branch, fork)
            return Sum(node, stream, branch, fork, region, _refusal(node, stream)) if _computes(flow, region) and _channels(flow, node, branch) else None
    return None


def _projected(flow: Flow, node: fx.Node) -> Sum | None:
    """Two branches of one activation, one of them a single site."""
    a, b = flow.live_inputs(node)
    fork = next(flow.common_live(a, b), None)
    if fork is None:
        return None
    found = [(s, o, _sites(flow, _region(flow, None, s, fork))) for s, o in ((a, b), (b, a))]
    (stream, branch, shortcut), (_, _, longer) = sorted(found, key=lambda x: len(x[2]))
    if len(shortcut) != 1 or len(longer) < 2 or not _channels(flow, node, branch):
        return None
    return Sum(node, stream, branch, fork, _region(flow, None, branch, fork), f"its shortcut is a projection, {shortcut[0].name}")


def _region(flow: Flow, stream: fx.Node | None, branch: fx.Node, fork: fx.Node) -> int:
    """Nodes from the fork to the branch that the stream does not need."""
    end, start = flow.index[branch], flow.index[fork]
    region = (flow.above[end] | 1 << end) & flow.below[start]
    if stream is not None:
        region &= ~(flow.above[flow.index[stream]] | 1 << flow.index[stream])
    return region


def _sites(flow: Flow, region: int) -> list[WeightSite]:
    return [flow.sites[n] for n in flow.members(region) if n in flow.sites]


def _computes(flow: Flow, region: int) -> bool:
    return any(flow.is_end(n) for n in flow.members(region))


def _channels(flow: Flow, node: fx.Node, branch: fx.Node) -> set[Atom]:
    """Leaves of the axis that the branch's last sites write and the sum has."""
    return {leaf for leaf in flow.out_leaves(*flow.writers(branch)) & flow.leaves(node) if flow.class_of(leaf) is not None}


def _refusal(node: fx.Node, stream: fx.Node) -> str:
    mine, other = stream.meta.get("val"), node.meta.get("val")
    if not isinstance(mine, Tensor) or not isinstance(other, Tensor) or mine.dtype != other.dtype:
        return f"the stream has another type than {node.name}"
    return f"{node.name} scales its stream" if node.args[1] is stream and argument(node, "alpha") != 1 else ""


def find_residuals(flow: Flow, sums: tuple[Sum, ...]) -> tuple[tuple[Residual, ...], dict[fx.Node, int]]:
    """The streams, and for each sum the index of its stream. A sum joins the stream of the last sum that its own stream operand comes from."""
    stream_of: dict[fx.Node, int] = {}
    chains: list[list[Sum]] = []
    for one in sums:
        behind = [] if "projection" in one.refusal else flow.walk_back(one.stream, flow.is_end)[0]
        earlier = next((stream_of[n] for n in behind if n in stream_of), None)
        if earlier is None:
            earlier = len(chains)
            chains.append([])
        chains[earlier].append(one)
        stream_of[one.node] = earlier
    return tuple(_residual(flow, i, chain) for i, chain in enumerate(chains)), stream_of


def _residual(flow: Flow, index: int, chain: list[Sum]) -> Residual:
    writers = list(dict.fromkeys(s for one in chain for s in flow.writers(one.branch) if flow.out_leaves(s) & flow.leaves(one.node)))
    classes = _stream_classes(flow, chain)
    return Residual(index, classes, tuple(writers), any(map(_norms, classes)), chain[0].fork, tuple(s.node for s in chain))


def _stream_classes(flow: Flow, chain: list[Sum]) -> tuple[AxisClass, ...]:
    """Classes on the axis that the blocks write; where blocks write different axes (token mixing), on the one that most norms go over."""
    found: dict[Atom, int] = {}
    for one in chain:
        axes: Any = flow.analysis.axes[one.node]
        written = _channels(flow, one.node, one.branch)
        found |= {leaf: d for d, axis in enumerate(axes) for leaf in leaves(axis) if leaf in written}
    norms = {d: max(_norms(c) for leaf, at in found.items() if at == d for c in flow.classes([leaf])) for d in found.values()}
    return flow.classes(leaf for leaf, d in found.items() if norms[d] == max(norms.values()))


def _norms(one: AxisClass) -> int:
    """How many layer and root-mean-square norms go over the class."""
    return sum("group_norm" not in name for name in one.reductions)


def make_blocks(
    flow: Flow, sums: tuple[Sum, ...], stream_of: dict[fx.Node, int], attentions: tuple[Attention, ...], feed_forwards: tuple[FeedForward, ...],
) -> tuple[Block, ...]:  # fmt: skip
    """The blocks in graph order, with layers."""
    from .layers import number_layers

    drafts = [_parts(flow, one, attentions, feed_forwards) for one in sums]
    halves = [bool(d["attentions"]) and not d["feed_forwards"] for d in drafts]
    layers = number_layers([d["sites"] for d in drafts], [stream_of[s.node] for s in sums], halves)
    return tuple(
        Block(layer=layer, index=i, residual=stream_of[s.node], path=path, why_not=s.refusal, node=s.node, stream=s.stream, branch=s.branch, **draft)
        for i, (s, draft, (layer, path)) in enumerate(zip(sums, drafts, layers, strict=True))
    )


def _parts(flow: Flow, one: Sum, attentions: tuple[Attention, ...], feed_forwards: tuple[FeedForward, ...]) -> dict[str, Any]:
    inside = set(flow.members(one.region))
    mine = tuple(a for a in attentions if a.node in inside)
    fed = tuple(f for f in feed_forwards if f.down.node in inside)
    nodes = inside | {s.node for a in mine for s in a.sites}
    sites = tuple(s for n, s in flow.sites.items() if n in nodes)
    return {"sites": sites, "attentions": mine, "feed_forwards": fed, "kind": _kind(sites, mine)}


def _kind(sites: tuple[WeightSite, ...], attentions: tuple[Attention, ...]) -> BlockKind:
    if attentions:
        return BlockKind.ATTENTION
    if any(s.kind in CONVOLUTIONS for s in sites):
        return BlockKind.CONVOLUTION
    return BlockKind.FEED_FORWARD if len(sites) > 1 else BlockKind.OTHER


def residual_leaves(residuals: tuple[Residual, ...]) -> set[Atom]:
    """Leaves of the classes of all streams."""
    return {leaf for r in residuals for c in r.classes for leaf in leaves((c.atom,))}
