"""The groups a structured pass chooses among: axis classes with a role, and the weight sites that consume them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ir.atoms import Axis, leaves
from ...ir.axes import AxisAnalysis, AxisClass, analyze_axes, labels
from ...ir.edit import Editor
from ...ir.program import Program
from ...ir.sites import SiteKind, WeightSite
from ...ir.structure import Role, Structure
from ...ir.weights import AliasClasses, alias_classes
from ..base import Skip


@dataclass(frozen=True, eq=False)
class Consumer:
    """A site that multiplies by a class: `axis` is the class's axis among the columns of its matrix `[N, K]`, outside `kernel` positions."""

    site: WeightSite
    axis: Axis = field(repr=False)
    kernel: int = 1

    def columns(self, one: AxisClass) -> Tensor:
        """Per column of the matrix the index of the class it belongs to, `[K] int64`, or -1."""
        return labels(self.axis, one.atom).repeat_interleave(self.kernel)

    def per_index(self, one: AxisClass, values: Tensor) -> Tensor:
        """Sum `values [K]` over the columns of each index of the class: `[size] f32`."""
        owner = self.columns(one)
        return torch.zeros(one.size).index_add_(0, owner[owner >= 0], values.float()[owner >= 0])


@dataclass(frozen=True, eq=False)
class Group:
    """A class that may be made smaller, with what it costs: `parameters` and `macs` are what removing one index saves."""

    axis: AxisClass
    role: Role
    analysis: AxisAnalysis = field(repr=False)
    consumers: tuple[Consumer, ...]
    parameters: int
    macs: int
    layer: int | None = None

    @property
    def name(self) -> str:
        """The class's name: its first tensor and dimension."""
        return self.axis.name

    @property
    def size(self) -> int:
        """Number of indices."""
        return self.axis.size


def find_groups(program: Program, structure: Structure, roles: Sequence[Role]) -> list[Group]:
    """A group for every unpinned class of one of the roles, in the order of the analysis."""
    analysis = structure.analysis
    inputs = consumers(program, analysis)
    parameters, macs = analysis.parameters(), analysis.macs()
    found = []
    for one in analysis.classes:
        role = structure.role_of(one)
        if role not in roles or role is None or one.pinned or one.size < 2:
            continue
        fewer = {one.atom: torch.arange(one.size - 1)}
        mine = tuple(c for c in inputs if one.atom in set(leaves(c.axis)))
        saved = parameters - analysis.parameters(fewer), macs - analysis.macs(fewer)
        found.append(Group(one, role, analysis, mine, *saved, structure.layer_of(one)))
    return found


def pinned_skips(structure: Structure, roles: Collection[Role]) -> list[Skip]:
    """A skip, with the reason, for every class of one of the roles from which nothing may be removed."""
    pinned = [c for c in structure.analysis.classes if structure.role_of(c) in roles and c.pinned]
    return [Skip(c.name, f"{structure.roles[c].value}: {c.pinned[0]}") for c in pinned]


def consumers(program: Program, analysis: AxisAnalysis) -> list[Consumer]:
    """Every plain site (and packed one that may be cut) with the axis of its inputs; the input channels of a grouped convolution are those of one group."""
    aliases = alias_classes(program.graph_module)
    plain = [s for s in program.sites() if s.kind is not SiteKind.EMBEDDING and (not s.compressed or s.node in analysis.packed)]
    return [_consumer(s, analysis, aliases) for s in plain]


def _consumer(site: WeightSite, analysis: AxisAnalysis, aliases: AliasClasses) -> Consumer:
    if site.compressed:
        return Consumer(site, analysis.packed[site.node][1])
    axes = analysis.tensors[aliases.of(site.tensors[0])[0]]
    return Consumer(site, axes[site.in_axis], site.columns // site.shape[site.in_axis])


def cut(program: Program, kept: Mapping[Group, Tensor], pass_spec: str, why: str, *, prefixes: bool = False, views: bool = False) -> None:
    """Keep only the given indices of every group. Groups are found again by name: biases may have come, or the program may be a clone.

    `prefixes`: of compressed weights too. `views`: prefixes share memory with the tensors they were cut from.
    """
    if kept:
        analysis = analyze_axes(program, prefixes=prefixes)
        with Editor(program, pass_spec) as editor:
            editor.resize_axis(analysis, {analysis.class_named(g.name): i for g, i in kept.items()}, why, views=views)
