"""Positions of heads in weights, for every layout of the zoo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.ir.finders.flow import Flow
from fxpress.ir.heads import Heads, find_heads, positions
from fxpress.ir.program import Program
from fxpress.ir.structure import Attention, find_structure

from .. import attention_models
from ..tiny import fresh_program


def layout(program: Program) -> tuple[int, int, Tensor, Tensor, Heads, Attention]:
    structure = find_structure(program)
    attention = structure.attentions[0]
    heads = find_heads(Flow(structure.analysis), attention)
    one = attention.qk_dims[0]
    return heads.count, heads.members, heads.query_rows(one), heads.key_rows(one), heads, attention


def test_grouped_queries_and_halves_of_pairs() -> None:
    count, members, queries, keys, heads, attention = layout(fresh_program("llama"))
    assert (count, members) == (2, 2)
    assert queries[1, 0].tolist() == [[16, 20], [17, 21], [18, 22], [19, 23]]
    assert keys[1].tolist() == [[8, 12], [9, 13], [10, 14], [11, 15]]
    assert heads.value_rows(attention.v_dims[0]).tolist() == torch.arange(16).view(2, 8).tolist()
    assert heads.output_columns(attention.v_dims[0]).tolist() == torch.arange(32).view(2, 2, 8).tolist()


def test_fused_projections() -> None:
    _, members, queries, keys, heads, attention = layout(fresh_program("gpt2"))
    assert attention.o is not None
    width = attention.o.columns
    assert members == 1
    assert queries.flatten().tolist() == list(range(width))
    assert keys.flatten().tolist() == list(range(width, 2 * width))
    assert heads.value_rows(attention.v_dims[0]).flatten().tolist() == list(range(2 * width, 3 * width))


def test_fused_groups() -> None:
    count, members, queries, keys, _, _ = layout(attention_models.program("fused_groups"))
    assert (count, members) == (2, 2)
    assert queries.flatten().tolist() == list(range(32))
    assert keys.flatten().tolist() == list(range(32, 48))


def test_one_key_head() -> None:
    count, members, queries, keys, _, _ = layout(attention_models.program("one_key_head"))
    assert (count, members, tuple(queries.shape), tuple(keys.shape)) == (1, 4, (1, 4, 4, 2), (1, 4, 2))


def test_values_that_share_their_class_with_queries_are_refused() -> None:
    _, _, _, _, heads, attention = layout(attention_models.program("vision"))
    with pytest.raises(ValueError, match="expected 1"):
        heads.value_rows(attention.v_dims[0])


def test_leaves_that_an_axis_does_not_hold_are_refused() -> None:
    structure = find_structure(fresh_program("llama"))
    flow, attention = Flow(structure.analysis), structure.attentions[0]
    assert attention.o is not None
    with pytest.raises(ValueError, match="evenly"):
        positions(flow.in_axis(attention.o), [structure.feed_forwards[0].hidden.atom])
