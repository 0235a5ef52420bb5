"""Rotary tables of an attention's own: exact, and pairs of every layer and head go alone from then on."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.axes import analyze_axes
from fxpress.ir.edit import Editor
from fxpress.ir.finders.flow import Flow
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.rotary import find_turns, index_name, own_tables
from fxpress.ir.structure import Role, find_structure

from .. import attention_models
from ..masking import difference, double, outputs
from ..tiny import fresh_program, tiny


def with_tables(program: Program) -> Program:
    structure = find_structure(program)
    flow = Flow(structure.analysis)
    with Editor(program, "test") as editor:
        for attention in structure.attentions:
            turns = find_turns(flow, attention, attention.qk_dims[0])
            assert not isinstance(turns, str), turns
            own_tables(editor, turns)
    return program


@pytest.mark.parametrize("name", ["llama", "llama_eager", "one_key_head", "qk_norm"])
def test_tables_of_their_own_change_nothing_and_part_the_layers(name: str) -> None:
    program = attention_models.program(name) if name in ("one_key_head", "qk_norm") else double(fresh_program(name))
    before, shared = outputs(program), [c for c in analyze_axes(program).classes if "inv_freq" in str(c.occurrences)]
    with_tables(program)
    program.verify()
    assert difference(outputs(program), before) == 0
    structure = find_structure(program)
    pairs = structure.with_role(Role.ROPE)
    assert [structure.layer_of(c) for c in pairs] == [0, 1]
    assert not any(c.pinned for c in pairs)
    assert name != "llama" or (len(shared) == 1 and not any("inv_freq" in str(c.occurrences) for c in pairs))


def test_other_sizes_run() -> None:
    program = with_tables(double(fresh_program("llama")))
    other = tiny("llama").other
    assert other is not None
    assert difference(outputs(program, other), outputs(double(fresh_program("llama")), other)) == 0


def test_a_head_may_keep_pairs_of_its_own() -> None:
    """Two key heads with different pairs in front: cut to those, each head's scores are the dense ones restricted to its pairs."""
    from fxpress.ir.heads import find_heads
    from fxpress.passes.head_bases import order_channels

    program = with_tables(double(fresh_program("llama")))
    masked = program.clone()
    order = torch.tensor([[3, 1, 0, 2], [2, 0, 1, 3]])
    structure = find_structure(program)
    flow, attention = Flow(structure.analysis), structure.attentions[0]
    heads, one = find_heads(flow, attention), attention.qk_dims[0]
    assert attention.q is not None and attention.k is not None
    with Editor(program, "test") as editor:
        order_channels(editor, heads, one, order, "test")
    assert difference(outputs(program), outputs(masked)) < 1e-12
    index = get_tensor(program.graph_module, index_name(attention.k))
    assert index.tolist() == [[3, 1, 0, 2, 7, 5, 4, 6], [2, 0, 1, 3, 6, 4, 5, 7]]
    rows = heads.query_rows(one)
    site = next(s for s in masked.sites() if s.name == attention.q.name)
    matrix = site.matrix().clone()
    for h in range(2):
        matrix[rows[h][:, order[h, 2:]].flatten()] = 0
    with Editor(masked, "test") as editor:
        editor.set_matrix(site, matrix, "pairs masked")
    analysis = analyze_axes(program)
    with Editor(program, "test") as editor:
        editor.resize_axis(analysis, {analysis.class_named(one.name): torch.arange(2)}, "cut")
    assert get_tensor(program.graph_module, index_name(attention.k)).tolist() == [[3, 1, 7, 5], [2, 0, 6, 4]]
    assert difference(outputs(program), outputs(masked)) < 1e-12


def test_what_has_no_rotary_table_is_refused() -> None:
    structure = find_structure(fresh_program("gpt2"))
    attention = structure.attentions[0]
    assert "no product with a rotary table" in str(find_turns(Flow(structure.analysis), attention, attention.qk_dims[0]))
