"""Groups: which classes, what they cost, and which columns of which sites they own."""

from __future__ import annotations

import torch

from fxpress.ir.structure import Role

from .nets import groups_of, mlp, tiny_with_data


def test_costs_are_what_removing_one_index_saves() -> None:
    program, _ = mlp()
    (group,) = groups_of(program)
    assert (group.role, group.size) == (Role.FFN, 20)
    assert group.parameters == 12 + 1 + 6
    assert group.macs == 64 * (12 + 6)
    assert [c.site.name for c in group.consumers] == ["down"]


def test_grouped_query_attention_has_heads_and_kv_groups() -> None:
    program, _ = tiny_with_data("llama")
    found = [(g.role, g.size, g.layer, [c.site.name.split(".")[-1] for c in g.consumers]) for g in groups_of(program)]
    layer = [(Role.KV_GROUP, 2, "o_proj"), (Role.HEAD, 2, "o_proj"), (Role.FFN, 88, "down_proj")]
    assert found == [(role, size, i, [site]) for i in range(2) for role, size, site in layer]


def test_columns_of_a_convolution_count_its_kernel() -> None:
    program, _ = tiny_with_data("conv")
    first = groups_of(program)[0]
    (consumer,) = first.consumers
    assert torch.equal(consumer.columns(first.axis), torch.arange(8).repeat_interleave(9))
    assert torch.equal(consumer.per_index(first.axis, torch.ones(72)), torch.full((8,), 9.0))


def test_pinned_classes_are_no_groups() -> None:
    program, _ = mlp()
    assert groups_of(program, Role.RESIDUAL, Role.HEAD) == []
