"""Feed-forward networks whose hidden width the planner may cut instead of factorizing their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.axes import AxisAnalysis, kept_size
from ...ir.nodes import get_tensor
from ...ir.program import Program
from ...ir.sites import SiteKind, WeightSite
from ...ir.structure import FeedForward, Role, find_structure
from ..base import Skip
from ..structured.amounts import Limits
from ..structured.compensate import why_not
from ..structured.groups import Consumer, Group, find_groups
from ..structured.scores import observable


@dataclass(frozen=True, eq=False)
class Network:
    """A network with one hidden class: `sites` hold all its weights, `down` sums over the class, `counts` are the widths to try below its own.

    `per_unit` are the bytes of one hidden unit in all tensors that hold it, biases too; `new_bias` those of a bias that `down` gets to make up for what goes.
    """

    group: Group
    down: Consumer
    sites: tuple[WeightSite, ...]
    counts: tuple[int, ...]
    per_unit: int
    new_bias: int

    @property
    def name(self) -> str:
        """The hidden class's name."""
        return self.group.name

    def nbytes(self, kept: int) -> int:
        """Bytes with so many hidden units."""
        return self.per_unit * kept + (self.new_bias if kept < self.group.size else 0)


def find_networks(program: Program, limits: Limits, shares: Sequence[float]) -> tuple[list[Network], list[Skip]]:
    """Networks that can be made narrower, and why others cannot."""
    structure = find_structure(program)
    groups = {g.axis: g for g in find_groups(program, structure, (Role.FFN,))}
    found, skips = [], []
    for one in structure.feed_forwards:
        group = groups.get(one.hidden)
        reason = _why_not(one, group, structure.feed_forwards)
        if reason is None and group is not None:
            found.append(_network(one, group, limits, shares))
        else:
            skips.append(Skip(one.hidden.name, f"its width is not cut: {reason}"))
    return _apart(found, skips), skips


def _apart(found: Sequence[Network], skips: list[Skip]) -> list[Network]:
    """Networks without a site in common, those with most bytes first: linears in a row are networks that overlap, and a site is planned once."""
    owner: dict[str, Network] = {}
    for network in sorted(found, key=lambda n: -n.nbytes(n.group.size)):
        shared = next((s.name for s in network.sites if s.name in owner), None)
        if shared is None:
            owner |= {s.name: network for s in network.sites}
        else:
            skips.append(Skip(network.name, f"its width is not cut: {shared} belongs to the larger network of {owner[shared].name}"))
    return [n for n in found if n in owner.values()]


def _why_not(one: FeedForward, group: Group | None, networks: Sequence[FeedForward]) -> str | None:
    if len(one.hiddens) != 1:
        return f"it has {len(one.hiddens)} hidden classes"
    if group is None:
        return one.hidden.pinned[0] if one.hidden.pinned else "it has one hidden unit"
    if len([n for n in networks if n.hidden is one.hidden]) > 1 or [c.site.name for c in group.consumers] != [one.down.name]:
        return "others share its hidden units"
    if not observable(group) or any(s.tied for s in one.sites):
        return "its weights are tied, or its inputs cannot be observed"
    return why_not(one.down)


def _network(one: FeedForward, group: Group, limits: Limits, shares: Sequence[float]) -> Network:
    counts = limits.counts(group)
    near = {min(counts, key=lambda k: (abs(k - share * group.size), k)) for share in shares} - {group.size}
    down = one.down
    bias = down.rows * down.dtype.itemsize if down.bias is None and down.kind is not SiteKind.MM else 0
    return Network(group, group.consumers[0], one.sites, tuple(sorted(near)), unit_bytes(group.analysis, group), bias)


def unit_bytes(analysis: AxisAnalysis, group: Group) -> int:
    """Bytes of one index of the group in all tensors that hold it."""
    fewer: dict[object, Tensor] = {group.axis.atom: torch.arange(group.size - 1)}
    total = 0
    for name in {o.tensor for o in group.axis.occurrences}:
        axes, tensor = analysis.tensors[name], get_tensor(analysis.program.graph_module, name)
        left = 1
        for axis in axes:
            left *= kept_size(axis, fewer)  # type: ignore[arg-type]
        total += (tensor.numel() - left) * tensor.element_size()
    return total
