"""Modules found by structure: the hidden width of a feed-forward network, the summed channels of queries and keys, the channels of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor, fx

from ...ir.axes import AxisClass
from ...ir.edit import Editor
from ...ir.finders.flow import SAME, Flow, short_name
from ...ir.heads import Heads, find_heads
from ...ir.program import Program
from ...ir.rotary import Turn, find_turns, index_name, own_tables
from ...ir.shapes import ensure_values
from ...ir.sites import WeightSite
from ...ir.structure import Attention, Role, Structure, find_structure
from ..base import Skip
from ..structured.groups import Group, find_groups, pinned_skips

_MOVES = SAME | {f"aten.{n}" for n in ("split", "split_with_sizes", "chunk", "unbind", "select", "slice", "repeat_interleave", "cat", "index", "repeat")}
_SCALES = {"aten.mul", "aten.div"}


class Part(Enum):
    """Which of a layer's inner widths."""

    FEED_FORWARD = "feed_forward"  # hidden neurons
    QUERY_KEY = "query_key"  # channels or rotary pairs of the scores
    VALUE_OUTPUT = "value_output"  # channels of the values


@dataclass(frozen=True, eq=False)
class Module:
    """One inner width. `mixed`: any invertible map of a head's channels may be undone on the other side; `own`: every key head may order its own channels."""

    group: Group
    part: Part
    heads: Heads | None = field(default=None, repr=False)
    mixed: bool = False
    own: bool = False

    @property
    def name(self) -> str:
        """The class's name."""
        return self.group.name

    @property
    def axis(self) -> AxisClass:
        """The class."""
        return self.group.axis

    @property
    def output(self) -> WeightSite:
        """The site that sums over the width (feed-forward and values)."""
        return self.group.consumers[0].site

    @property
    def attention(self) -> Attention:
        """The attention of a query-key or value-output module."""
        assert self.heads is not None
        return self.heads.attention


@dataclass(frozen=True)
class Found:
    """The modules of a program, in graph order, and what is left out with the reason. `turns`: products with rotary tables, by query site."""

    modules: tuple[Module, ...]
    skips: tuple[Skip, ...]
    turns: Mapping[str, list[Turn]] = field(default_factory=dict, repr=False)


def find_tables(program: Program) -> tuple[dict[str, list[Turn]], list[Skip]]:
    """The products with rotary tables of every rotary attention, by its query site, and the attentions that cannot have tables of their own, with why."""
    structure = find_structure(program)
    flow, skips, found = Flow(structure.analysis), [], {}
    for attention in structure.attentions:
        if not attention.rotary or attention.q is None or attention.k is None:
            continue
        turns = [find_turns(flow, attention, c) for c in attention.qk_dims]
        reason = next((t for t in turns if isinstance(t, str)), None) or ("" if len(turns) == 1 else f"its scores sum over {len(turns)} kinds of channels")
        if reason:
            skips.append(Skip(attention.q.name, f"query_key: {reason}"))
        elif not isinstance(turns[0], str):
            found[attention.q.name] = turns[0]
    return found, skips


def give_own_tables(program: Program, pass_spec: str, turns: Iterable[list[Turn]] | None = None) -> None:
    """Give rotary attentions rotary tables of their own, an exact edit; `turns` may come from a clone, None stands for all there are."""
    ensure_values(program)
    nodes = {n.name: n for n in program.graph.nodes}
    with Editor(program, pass_spec) as editor:
        for one in find_tables(program)[0].values() if turns is None else turns:
            own_tables(editor, [replace(t, node=nodes[t.node.name], table=nodes[t.table.name]) for t in one])


def find_modules(program: Program, parts: Sequence[Part]) -> Found:
    """The modules of `program`, whose rotary attentions have tables of their own."""
    structure = find_structure(program)
    flow = Flow(structure.analysis)
    roles = {Part.FEED_FORWARD: [Role.FFN], Part.QUERY_KEY: [Role.ROPE, Role.QK_DIM], Part.VALUE_OUTPUT: [Role.V_DIM]}
    wanted = [r for p in parts for r in roles[p]]
    groups = {g.axis: g for g in find_groups(program, structure, wanted)}
    skips = pinned_skips(structure, wanted)
    modules: list[Module] = []
    for axis, group in groups.items():
        one = _module(flow, structure, group)
        if isinstance(one, str):
            skips.append(Skip(axis.name, f"{group.role.value}: {one}"))
        else:
            modules.append(one)
    return Found(tuple(modules), tuple(skips))


def _module(flow: Flow, structure: Structure, group: Group) -> Module | str:
    if group.role is Role.FFN:
        reason = _why_not_sites(flow, [c.site for c in group.consumers])
        return reason or (Module(group, Part.FEED_FORWARD) if len(group.consumers) == 1 else f"{len(group.consumers)} sites read it, expected one")
    attention = next((a for a in structure.attentions if group.axis in (*a.qk_dims, *a.v_dims)), None)
    if attention is None or any(s is None for s in (attention.q, attention.k, attention.v, attention.o)):
        return "a projection of the attention is missing"
    if (reason := _why_not_sites(flow, attention.sites)) is not None:
        return reason
    if group.axis.reductions:
        return f"{group.axis.reductions[0]} normalises or averages over it"
    heads = find_heads(flow, attention)
    try:
        return _values(flow, group, heads) if group.axis in attention.v_dims else _scores(flow, group, heads)
    except ValueError as error:
        return str(error)


def _values(flow: Flow, group: Group, heads: Heads) -> Module | str:
    attention = heads.attention
    assert attention.v is not None and attention.o is not None
    if len(attention.v_dims) != 1 or len(group.consumers) != 1:
        return f"values have {len(attention.v_dims)} kinds of channels, read by {len(group.consumers)} sites; expected one and one"
    if not _held_by(group.axis, attention.v, attention.o):
        return "a tensor other than the value and output projections holds it"
    behind = flow.walk_back(attention.o.data, lambda n: n is attention.node or flow.is_end(n))[0]
    nodes = [*flow.walk_on(attention.v.node, flow.is_end)[0], *(n for n in behind if flow.depends(n, attention.node))]
    if (node := _not_linear(nodes)) is not None:
        return f"{short_name(node)} at {node.name} stands between values and output projection"
    heads.value_rows(group.axis), heads.output_columns(group.axis)
    return Module(group, Part.VALUE_OUTPUT, heads, mixed=True, own=True)


def _scores(flow: Flow, group: Group, heads: Heads) -> Module | str:
    attention = heads.attention
    assert attention.q is not None and attention.k is not None
    if len(attention.qk_dims) != 1:
        return f"its scores sum over {len(attention.qk_dims)} kinds of channels, expected one"
    queries, keys = heads.query_rows(group.axis), heads.key_rows(group.axis)
    own = _held_by(group.axis, attention.q, attention.k)
    nodes = [n for s in dict.fromkeys((attention.q, attention.k)) for n in flow.walk_on(s.node, flow.is_end)[0]]
    plain = not attention.rotary and not attention.qk_norm and queries.shape[-1] == keys.shape[-1] == 1 and _not_linear(nodes) is None
    return Module(group, Part.QUERY_KEY, heads, mixed=own and plain, own=own)


def _held_by(axis: AxisClass, *sites: WeightSite) -> bool:
    """Whether no other tensor than those of the sites, and their rotary indices, holds the class."""
    known = {name for s in sites for name in (s.tensors[0], s.bias, index_name(s))}
    return {o.tensor for o in axis.occurrences} <= known


def _not_linear(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The first node that does more to tensors than move their values or multiply them by a number."""
    tensors = [n for n in nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
    return next((n for n in tensors if not (short_name(n) in _MOVES or (short_name(n) in _SCALES and not isinstance(n.args[1], fx.Node)))), None)


def _why_not_sites(flow: Flow, sites: Sequence[WeightSite | None]) -> str | None:
    for site in [flow.sites[s.node] for s in sites if s is not None]:
        if site.compressed:
            return f"{site.name} already holds {site.format.to_spec()}; decompose before quantizing"
        if site.tied:
            return f"the weight of {site.name} is tied to {', '.join(site.tied)}"
    return None
