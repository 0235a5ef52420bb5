"""The structure of a program, found from operators, users and axes alone: attention, feed-forward networks, residual blocks, and a role for each axis class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from torch import fx

from .atoms import Atom
from .axes import AxisAnalysis, AxisClass, analyze_axes
from .axis_rules.pointwise import is_pointwise
from .finders.attention import Attention, find_attentions
from .finders.feed_forward import FeedForward, find_feed_forwards
from .finders.flow import SAME, Flow, short_name
from .finders.norms import ConvNorm, NormLinear, find_conv_norms, find_norm_linears
from .finders.residual import Block, BlockKind, Residual, find_residuals, find_sums, make_blocks, residual_leaves
from .finders.scale_pairs import ScaleKind, ScalePair, find_scale_pairs
from .program import Program
from .sites import CONVOLUTIONS, SiteKind, WeightSite
from .structure_text import Line, structure_tree

__all__ = [
    "Attention", "Block", "BlockKind", "ConvNorm", "FeedForward", "NormLinear", "Residual", "Role", "ScaleKind", "ScalePair", "Structure", "find_structure",
]  # fmt: skip


class Role(Enum):
    """What an axis class means."""

    RESIDUAL = "residual"
    HEAD = "head"
    KV_GROUP = "kv_group"
    ROPE = "rope"
    QK_DIM = "qk_dim"
    V_DIM = "v_dim"
    FFN = "ffn"
    CONV_OUT = "conv_out"


@dataclass(frozen=True, eq=False)
class Structure:
    """What the finders found. `embeddings` look rows up, `heads` make the model's outputs."""

    analysis: AxisAnalysis
    residuals: tuple[Residual, ...]
    blocks: tuple[Block, ...]
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    conv_norms: tuple[ConvNorm, ...]
    norm_linears: tuple[NormLinear, ...]
    scale_pairs: tuple[ScalePair, ...]
    embeddings: tuple[WeightSite, ...]
    heads: tuple[WeightSite, ...]
    roles: Mapping[AxisClass, Role]
    _layers: Mapping[AxisClass, int]

    def role_of(self, one: AxisClass) -> Role | None:
        """The role of a class of this analysis, or None."""
        return self.roles.get(one)

    def with_role(self, role: Role) -> tuple[AxisClass, ...]:
        """The classes of one role, in the order of the analysis."""
        return tuple(c for c in self.analysis.classes if self.roles.get(c) is role)

    def layer_of(self, one: AxisClass) -> int | None:
        """The layer of the blocks a class lives in; None outside of blocks and for classes that span layers."""
        return self._layers.get(one)

    @cached_property
    def layers(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks, grouped by layer."""
        count = max((b.layer for b in self.blocks), default=-1) + 1
        return tuple(tuple(b for b in self.blocks if b.layer == i) for i in range(count))

    def tree(self) -> Line:
        """The structure as a tree of lines."""
        return structure_tree(self)

    def to_text(self) -> str:
        """The tree as text."""
        return self.tree().draw()


def find_structure(program: Program, analysis: AxisAnalysis | None = None) -> Structure:
    """The structure of `program`; `analysis` is that of the program as it stands now, made here when not given."""
    analysis = analysis if analysis is not None else analyze_axes(program)
    flow = Flow(analysis)
    attentions = find_attentions(flow)
    sums = find_sums(flow, attentions)
    residuals, stream_of = find_residuals(flow, sums)
    used = {c.atom for a in attentions for c in (*_head_classes(a), *a.qk_dims, *a.v_dims)}
    feed_forwards = find_feed_forwards(flow, used | residual_leaves(residuals))
    conv_norms, norm_linears = find_conv_norms(flow), find_norm_linears(flow)
    blocks = make_blocks(flow, sums, stream_of, attentions, feed_forwards)
    return Structure(
        analysis=analysis, residuals=residuals, blocks=blocks, attentions=attentions, feed_forwards=feed_forwards,
        conv_norms=conv_norms, norm_linears=norm_linears, scale_pairs=find_scale_pairs(flow, attentions, norm_linears, conv_norms),
        embeddings=tuple(s for s in flow.sites.values() if s.kind is SiteKind.EMBEDDING), heads=_output_sites(flow),
        roles=_roles(flow, residuals, attentions, feed_forwards), _layers=_class_layers(flow, blocks, residual_leaves(residuals)),
    )  # fmt: skip


def _head_classes(one: Attention) -> tuple[AxisClass, ...]:
    return tuple(c for c in (one.heads, one.kv_groups) if c is not None)


def _roles(flow: Flow, residuals: tuple[Residual, ...], attentions: tuple[Attention, ...], feed_forwards: tuple[FeedForward, ...]) -> dict[AxisClass, Role]:
    """Roles in the order of precedence; the first one found stays."""
    roles: dict[AxisClass, Role] = {}
    found = [(c, Role.RESIDUAL) for r in residuals if r.transformer_like for c in r.classes]
    for a in attentions:
        found += [(a.heads, Role.HEAD)] if a.heads else []
        found += [(a.kv_groups, Role.KV_GROUP)] if a.kv_groups else []
        found += [(c, Role.V_DIM) for c in a.v_dims]
        found += [(c, Role.ROPE if a.rotary else Role.QK_DIM) for c in a.qk_dims]
    found += [(c, Role.FFN) for f in feed_forwards for c in f.hiddens]
    found += [(c, Role.CONV_OUT) for s in flow.sites.values() if s.kind in CONVOLUTIONS for c in flow.classes(flow.out_leaves(s))]
    for one, role in found:
        roles.setdefault(one, role)
    return roles


def _class_layers(flow: Flow, blocks: tuple[Block, ...], streams: set[Atom]) -> dict[AxisClass, int]:
    """Classes whose sites lie in blocks of one layer; of nested blocks the innermost counts."""
    layer: dict[fx.Node, int] = {}
    for block in sorted(blocks, key=lambda b: -len(b.sites)):
        layer.update(dict.fromkeys((s.node for s in block.sites), block.layer))
    found: dict[Atom, set[int | None]] = {}
    for node, site in flow.sites.items():
        for leaf in flow.out_leaves(site) | flow.in_leaves(site):
            found.setdefault(leaf, set()).add(layer.get(node))
    classes = {c: found.get(c.atom, set()) for c in flow.analysis.classes if c.atom not in streams}
    return {c: one for c, layers in classes.items() if len(layers) == 1 and (one := next(iter(layers))) is not None}


def _output_sites(flow: Flow) -> tuple[WeightSite, ...]:
    """Sites that make an output, alone but for element-wise operators."""

    def stop(node: fx.Node) -> bool:
        return node in flow.sites or not (short_name(node) in SAME or is_pointwise(node)) or len(flow.live_inputs(node)) != 1

    ends = [flow.walk_back(n, stop)[1] for n in flow.nodes[-1].all_input_nodes if n in flow.live]
    return tuple(flow.sites[n] for n in dict.fromkeys(e for found in ends for e in found) if n in flow.sites)
