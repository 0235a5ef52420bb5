"""Where the heads of an attention stand in the rows and columns of its weights, read off the axes: any order of heads, groups and halves, fused or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .atoms import Atom, Axis, size_of
from .axes import AxisClass, labels
from .finders.attention import Attention
from .finders.flow import Flow
from .sites import WeightSite


def positions(axis: Axis, wanted: Sequence[Atom | None], without: Atom | None = None) -> Tensor:
    """Positions of `axis` by their index in every wanted leaf, `[*sizes, rest] int64`, rising along `rest`.

    A leaf of None has one index. Positions that a wanted leaf does not label, or that `without` does, are left out; `ValueError` when the rest is uneven.
    """
    total, key = torch.arange(size_of(axis)), torch.zeros(size_of(axis), dtype=torch.int64)
    inside = torch.ones(len(total), dtype=torch.bool) if without is None else labels(axis, without) < 0
    sizes = [leaf.size if leaf is not None else 1 for leaf in wanted]
    for leaf, size in zip(wanted, sizes, strict=True):
        own = labels(axis, leaf) if leaf is not None else torch.zeros_like(key)
        inside &= own >= 0
        key = key * size + own
    found = total[inside]
    order = key[inside].argsort(stable=True)
    counts = key[inside].bincount(minlength=int(torch.tensor(sizes).prod()))
    if len(found) == 0 or int(counts.min()) != int(counts.max()):
        raise ValueError(f"the axis of {size_of(axis)} positions does not hold the leaves of sizes {sizes} evenly")
    return found[order].view(*sizes, -1)


@dataclass(frozen=True, eq=False)
class Heads:
    """One attention's heads: H key-value heads, G query heads of each. `kv` and `member` are the leaves that tell them apart, None where there is one."""

    attention: Attention
    flow: Flow = field(repr=False)
    kv: Atom | None
    member: Atom | None

    @property
    def count(self) -> int:
        """H."""
        return self.kv.size if self.kv is not None else 1

    @property
    def members(self) -> int:
        """G."""
        return self.member.size if self.member is not None else 1

    def query_rows(self, one: AxisClass) -> Tensor:
        """Rows of the query projection by key head, query head and index of a summed class: `[H, G, size, rest]`."""
        assert self.attention.q is not None
        found = positions(self.flow.out_axis(self.attention.q), [self.kv, self.member, one.atom])
        return found[..., : found.shape[-1] // 2] if self._halved else found

    def key_rows(self, one: AxisClass) -> Tensor:
        """Rows of the key projection by key head and index of a summed class: `[H, size, rest]`."""
        assert self.attention.k is not None
        fused = self.attention.k == self.attention.q
        found = positions(self.flow.out_axis(self.attention.k), [self.kv, one.atom], without=self.member if fused else None)
        return found[..., found.shape[-1] // 2 :] if self._halved else found

    @property
    def _halved(self) -> bool:
        """Whether one site makes queries and keys alike: the first half of the positions is called queries, which of the two they are does not matter."""
        return self.attention.q == self.attention.k and self.member is None

    def value_rows(self, one: AxisClass) -> Tensor:
        """Rows of the value projection, `[H, size]`."""
        assert self.attention.v is not None
        return self._single(self.attention.v, positions(self.flow.out_axis(self.attention.v), [self.kv, one.atom]))

    def output_columns(self, one: AxisClass) -> Tensor:
        """Columns of the output projection, `[H, G, size]`."""
        assert self.attention.o is not None
        return self._single(self.attention.o, positions(self.flow.in_axis(self.attention.o), [self.kv, self.member, one.atom]))

    def _single(self, site: WeightSite, found: Tensor) -> Tensor:
        if found.shape[-1] != 1:
            raise ValueError(f"{site.name} holds {found.shape[-1]} positions for each value channel of a head, expected 1")
        return found[..., 0]


def find_heads(flow: Flow, attention: Attention) -> Heads:
    """The heads of an attention; without grouped queries every query head has a key head of its own."""
    if attention.kv_groups is not None:
        return Heads(attention, flow, attention.kv_groups.atom, attention.group_members.atom if attention.group_members else None)
    heads = attention.heads.atom if attention.heads is not None else None
    return Heads(attention, flow, None, heads) if attention.num_kv_heads < attention.num_heads else Heads(attention, flow, heads, None)
