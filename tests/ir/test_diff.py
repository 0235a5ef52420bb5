"""`GraphDiff`: kinds, chains of passes, matching without a journal, folding, and its plain forms."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxpress.ir.capture import capture
from fxpress.ir.diff import DiffSource, GraphDiff, Kind, NodeDiff
from fxpress.ir.diff_fold import fold
from fxpress.ir.diff_snapshot import NodeView
from fxpress.ir.diff_text import human_bytes, human_count
from fxpress.ir.edit import Editor
from fxpress.ir.errors import EditError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.inputs import Inputs
from fxpress.ir.journal import Action
from fxpress.ir.program import Program
from fxpress.ir.sites import SiteKind, site_named

from ..tiny import randn, tiny

Captured = Callable[[str], Program]
PRUNE, QUANTIZE = "prune_magnitude{fraction=0.5}", "quantize_rtn{bits=4}"
aten = torch.ops.aten


def prune(program: Program) -> None:
    with Editor(program, PRUNE) as editor:
        for site in program.sites():
            if site.kind is not SiteKind.EMBEDDING:
                matrix = site.matrix()
                editor.set_matrix(site, matrix * (matrix.abs() > matrix.abs().median()), "lowest magnitude", {"sparsity": 0.5})


def quantize(program: Program) -> None:
    fmt = Affine(bits=4)
    with Editor(program, QUANTIZE) as editor:
        for site in program.sites():
            if site.kind is not SiteKind.EMBEDDING and fmt.why_illegal(site.rows, site.columns) is None:
                editor.compress(site, fmt, fmt.encode(site.matrix()), "round to nearest", {"error": float(site.matrix().norm())})


def kinds(diff: GraphDiff) -> dict[str, int]:
    return {k.value: n for k, n in diff.counts.items() if n}


def named(diff: GraphDiff, module: str) -> NodeDiff:
    return next(e for e in diff.entries if e.module == module)


# ---- from the journal ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv", "embedding", "llama_tied", "gpt2"])
def test_a_clone_differs_in_nothing(captured: Captured, name: str) -> None:
    program = captured(name)
    for diff in (GraphDiff.from_journal(program, program.clone()), GraphDiff.between(program, program.clone())):
        assert diff.is_empty
        assert diff.before == diff.after
        assert "no node changed" in diff.to_text()


@pytest.mark.parametrize("name", ["mlp", "conv", "conv1d", "embedding", "llama", "llama_tied", "gpt2", "resnet"])
def test_totals_are_those_of_the_programs(captured: Captured, name: str) -> None:
    original = captured(name)
    program = original.clone()
    quantize(program)
    diff = GraphDiff.from_journal(original, program)
    assert (diff.before.nbytes, diff.after.nbytes) == (original.nbytes, program.nbytes)
    assert diff.before.parameters == original.parameters
    assert sum(e.bytes_before for e in diff.entries) + diff.before.unread == original.nbytes
    assert sum(e.bytes_after for e in diff.entries) + diff.after.unread == program.nbytes
    assert diff.before.nodes == sum(e.before is not None for e in diff.entries)


def test_a_quantized_site_is_replaced_with_its_pass_reason_and_facts(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    quantize(program)
    entry = named(GraphDiff.from_journal(original, program), "up")
    assert entry.kind is Kind.REPLACED
    assert entry.before is not None
    assert entry.after is not None
    assert (entry.before.op, entry.after.op) == ("aten.linear", "fxpress.linear")
    assert (entry.before.format, entry.after.format) == ("dense", "affine{bits=4}")
    assert entry.before.weight == entry.after.weight == "f32[20, 12]"
    assert entry.bytes_before == 4 * (20 * 12 + 20) > entry.bytes_after
    (step,) = entry.steps
    assert (step.pass_spec, step.why) == (QUANTIZE, "round to nearest")
    assert step.facts["error"] > 0


def test_passes_in_turn_form_a_chain(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    prune(program)
    quantize(program)
    diff = GraphDiff.from_journal(original, program)
    entry = named(diff, "down")
    assert entry.kind is Kind.REPLACED
    assert entry.passes == (PRUNE, QUANTIZE)
    assert [s.action for s in entry.steps] == [Action.REWEIGHTED, Action.REPLACED]
    assert diff.passes == (PRUNE, QUANTIZE)
    assert diff.touched == {PRUNE: 2, QUANTIZE: 2}
    text = diff.to_text()
    assert text.index(f"1. {PRUNE}") < text.index(f"2. {QUANTIZE}")


def test_the_second_half_of_a_chain_starts_where_the_original_stands(captured: Captured) -> None:
    original = captured("mlp")
    prune(original)
    program = original.clone()
    quantize(program)
    assert GraphDiff.from_journal(original, program).passes == (QUANTIZE,)


def test_new_values_alone_are_reweighted(captured: Captured) -> None:
    original = captured("conv")
    program = original.clone()
    prune(program)
    assert kinds(GraphDiff.from_journal(original, program)) == {"reweighted": 3, "unchanged": 9}


def test_a_node_tied_to_an_edited_one_is_reweighted_and_says_so(captured: Captured) -> None:
    original = captured("embedding")
    program = original.clone()
    with Editor(program, "p") as editor:
        head = next(s for s in program.sites() if s.tied and s.kind is SiteKind.LINEAR)
        editor.set_matrix(head, head.matrix() * 2, "twice")
    changed = {e.view.op: e for e in GraphDiff.from_journal(original, program).changed}
    assert changed["aten.linear"].steps
    assert changed["aten.embedding"].kind is Kind.REWEIGHTED
    assert "shares its weight with" in changed["aten.embedding"].note


def test_a_site_that_lost_its_tie_counts_its_bytes_and_says_so(captured: Captured) -> None:
    original = captured("embedding")
    program = original.clone()
    fmt = Affine(bits=8)
    with Editor(program, "p") as editor:
        table = next(s for s in program.sites() if s.kind is SiteKind.EMBEDDING)
        editor.compress(table, fmt, fmt.encode(table.matrix()), "smaller")
    head = next(e for e in GraphDiff.from_journal(original, program).entries if e.view.op == "aten.linear" and e.before and e.before.tied)
    assert head.kind is Kind.UNCHANGED
    assert (head.bytes_before, head.bytes_after) == (0, 24 * 8 * 4)
    assert head.note == "no longer shares its weight with embed"
    assert head.note in GraphDiff.from_journal(original, program).to_text()


def test_a_bypassed_node_is_removed_and_its_users_rewired(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    with Editor(program, "drop_relu") as editor:
        editor.bypass(relu, relu.args[0], "linear enough")
    diff = GraphDiff.from_journal(original, program)
    assert kinds(diff) == {"removed": 1, "rewired": 1, "unchanged": 3}
    removed = next(e for e in diff.entries if e.kind is Kind.REMOVED)
    assert (removed.after, removed.steps[0].why) == (None, "linear enough")
    assert [e.view.op for e in diff.entries] == ["placeholder", "aten.linear", "aten.relu", "aten.linear", "output"]


def test_edits_that_nobody_recorded_are_found(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    relu = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    with Editor(program, "silent") as editor:
        editor.set_tensor("down.weight", torch.zeros(6, 20))
        with program.graph.inserting_after(relu):
            twice = program.graph.call_function(aten.mul.Tensor, (relu, 2.0))
        next(u for u in relu.users if u is not twice).replace_input_with(relu, twice)
    diff = GraphDiff.from_journal(original, program)
    assert kinds(diff) == {"added": 1, "reweighted": 1, "unchanged": 4}
    assert diff.passes == ()


def test_changed_constants_are_rewired(captured: Captured) -> None:
    original = captured("conv")
    program = original.clone()
    mean = next(n for n in program.graph.nodes if n.target is aten.mean.dim)
    mean.args = (mean.args[0], [3, 2])
    assert [e.view.op for e in GraphDiff.from_journal(original, program).changed] == ["aten.mean.dim"]


def test_an_untied_weight_is_added_under_its_site(captured: Captured) -> None:
    original = captured("embedding")
    program = original.clone()
    with Editor(program, "untie") as editor:
        editor.untie(site_named(program, "head"))
    added = next(e for e in GraphDiff.from_journal(original, program).entries if e.kind is Kind.ADDED)
    assert (added.view.op, added.module) == ("get_attr", "head")


def test_compressing_and_decompressing_leaves_other_values(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    quantize(program)
    with Editor(program, "back") as editor:
        for site in program.sites():
            editor.decompress(site, "decoded")
    entry = named(GraphDiff.from_journal(original, program), "up")
    assert entry.kind is Kind.REWEIGHTED
    last = entry.steps[-1].after
    assert last is not None
    assert (len(entry.steps), last.format) == (2, "dense")


def test_edits_for_one_reason_count_as_one_step(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    with Editor(program, "p") as editor:
        site = site_named(program, "up")
        editor.set_matrix(site, site.matrix() * 2, "scaled", {"scale": 2})
        editor.set_bias(site, torch.ones(20), "scaled")
    (step,) = named(GraphDiff.from_journal(original, program), "up").steps
    assert step.facts == {"scale": 2}


def test_a_foreign_program_is_refused(captured: Captured) -> None:
    original = captured("mlp")
    prune(original)
    with pytest.raises(EditError, match=r"GraphDiff\.between"):
        GraphDiff.from_journal(original, captured("mlp"))


# ---- by matching --------------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Residual blocks, their weights from one seed per original position."""

    def __init__(self, keep: tuple[int, ...], name: str = "layers", activation: Callable[[Tensor], Tensor] = torch.relu, hidden: int = 16) -> None:
        super().__init__()
        self.activation, self.name = activation, name
        blocks = []
        for i in keep:
            torch.manual_seed(i)
            blocks.append(nn.ModuleDict({"up": nn.Linear(8, hidden), "down": nn.Linear(hidden, 8)}))
        self.add_module(name, nn.ModuleList(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 8] -> [B, 8]`."""
        for block in self.get_submodule(self.name):  # type: ignore[attr-defined]
            x = x + block["down"](self.activation(block["up"](x)))
        return x


def stack(*keep: int, name: str = "layers", activation: Callable[[Tensor], Tensor] = torch.relu, hidden: int = 16) -> Program:
    return capture(Stack(keep, name, activation, hidden), (randn(2, 8),))


@pytest.mark.parametrize("name", ["mlp", "conv", "conv1d", "llama", "gpt2", "bert", "resnet", "mobilenet_v2"])
def test_matching_finds_what_the_journal_says(captured: Captured, name: str) -> None:
    original = captured(name)
    program = original.clone()
    prune(program)
    quantize(program)
    told, found = GraphDiff.from_journal(original, program), GraphDiff.between(original, program)
    assert found.source is DiffSource.MATCHING
    assert [(e.kind, e.before, e.after) for e in found.entries] == [(e.kind, e.before, e.after) for e in told.entries]


@pytest.mark.parametrize("name", ["mlp", pytest.param("llama", marks=pytest.mark.slow), "convnext"])  # test_text.py captures a llama twice, too
def test_two_captures_of_one_model_are_the_same(captured: Captured, name: str) -> None:
    model = tiny(name)
    again = capture(model.model, model.example_inputs, dynamic_shapes=model.dynamic_shapes)
    assert GraphDiff.between(captured(name), again).is_empty


def test_a_renamed_module_is_unchanged_and_says_where_it_was() -> None:
    diff = GraphDiff.between(stack(0, 1, 2), stack(0, 1, 2, name="blocks"))
    assert diff.is_empty
    assert named(diff, "blocks.1.up").note == "was at layers.1.up"
    assert "blocks.[0-2].up" in diff.to_text()


def test_a_renamed_and_quantized_module_is_still_matched() -> None:
    renamed = stack(0, 1, 2, name="blocks")
    quantize(renamed)
    assert kinds(GraphDiff.between(stack(0, 1, 2), renamed)) == {"replaced": 6, "unchanged": 8}


def test_a_dropped_block_is_removed_and_its_followers_move_up() -> None:
    diff = GraphDiff.between(stack(0, 1, 2, 3, 4), stack(0, 1, 3, 4))
    assert [e.module for e in diff.entries if e.kind is Kind.REMOVED and e.module] == ["layers.2.up", "layers.2.down"]
    assert {e.note for e in diff.entries if e.note.startswith("was at") and e.module.endswith("up")} == {"was at layers.3.up", "was at layers.4.up"}
    assert diff.counts[Kind.REPLACED] == diff.counts[Kind.ADDED] == diff.counts[Kind.REWEIGHTED] == 0
    assert diff.counts[Kind.REMOVED] == 4


def test_an_inserted_block_is_added() -> None:
    diff = GraphDiff.between(stack(0, 1, 2), stack(0, 9, 1, 2))
    assert {e.module for e in diff.entries if e.kind is Kind.ADDED and e.module} == {"layers.1.up", "layers.1.down"}
    assert diff.counts[Kind.ADDED] == 4


def test_another_operator_in_the_same_place_is_replaced() -> None:
    diff = GraphDiff.between(stack(0, 1), stack(0, 1, activation=torch.tanh))
    assert kinds(diff) == {"replaced": 2, "unchanged": 8}
    assert {(e.before.op, e.after.op) for e in diff.changed if e.before and e.after} == {("aten.relu", "aten.tanh")}


def test_another_width_is_retyped() -> None:
    diff = GraphDiff.between(stack(0, 1), stack(0, 1, hidden=12))
    assert kinds(diff) == {"retyped": 6, "unchanged": 4}
    assert "weight f32[16, 8] -> f32[12, 8]" in diff.to_text()


def test_nothing_in_common_is_all_replaced_or_exchanged() -> None:
    diff = GraphDiff.between(stack(0), capture(nn.Sequential(nn.Softmax(-1), nn.Tanh()), (randn(2, 8),)))
    assert diff.before.nodes == sum(e.before is not None for e in diff.entries)
    assert diff.after.nodes == sum(e.after is not None for e in diff.entries)


def chain(length: int) -> Program:
    """`length` nodes of one operator in no module: the matcher's hardest case."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(length):
        node = graph.call_function(aten.relu.default, (node,))
    graph.output((node,))
    return Program(fx.GraphModule(nn.Module(), graph), Inputs((randn(2),)))


def test_thousands_of_equal_nodes_are_matched_quickly() -> None:
    start = time.perf_counter()
    diff = GraphDiff.between(chain(2300), chain(2290))
    assert time.perf_counter() - start < 5
    assert diff.counts[Kind.REMOVED] == 10
    assert diff.counts[Kind.REPLACED] == diff.counts[Kind.ADDED] == 0


def test_equal_inputs_give_equal_diffs(captured: Captured) -> None:
    original, program = captured("llama"), captured("llama")
    quantize(program)
    first, second = GraphDiff.between(original, program), GraphDiff.between(original.clone(), program.clone())
    assert first.to_dict() == second.to_dict()
    assert first.to_text() == second.to_text()


# ---- plain forms --------------------------------------------------------------------------------------------------------------------


def test_the_dictionary_survives_json(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    with Editor(program, "p") as editor:
        site = site_named(program, "up")
        editor.set_matrix(site, site.matrix() * 2, "twice", {"broken": math.nan, "far": math.inf, "fine": 0.5})
    data = GraphDiff.from_journal(original, program).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema_version"] == 1
    entry = next(e for e in data["entries"] if e["module"] == "up")
    assert entry["steps"][0]["facts"] == {"broken": "nan", "far": "inf", "fine": 0.5}
    assert data["passes"] == [{"spec": "p", "nodes": 1}]


def test_repeated_blocks_fold_into_one_row(captured: Captured) -> None:
    original = captured("llama")
    program = original.clone()
    quantize(program)
    text = GraphDiff.from_journal(original, program).to_text()
    rows = [line for line in text.splitlines() if line.startswith("~")]
    assert len(rows) == 8
    (row,) = [r for r in rows if "model.layers.[0-1].mlp.down_proj" in r]
    assert "x2" in row
    assert "error" in text


def test_rows_are_limited_and_what_is_left_out_is_counted(captured: Captured) -> None:
    original = captured("llama")
    program = original.clone()
    quantize(program)
    text = GraphDiff.from_journal(original, program).to_text(max_rows=2)
    assert sum(line.startswith("~") for line in text.splitlines()) == 2
    assert "... 6 more rows (11 nodes); raise max_rows to see them" in text
    assert "bytes  " in text


def test_color_changes_nothing_but_color(captured: Captured) -> None:
    original = captured("mlp")
    program = original.clone()
    quantize(program)
    diff = GraphDiff.from_journal(original, program)
    assert "\x1b" not in diff.to_text()
    assert diff.to_text(color=True).replace("\x1b[33m", "").replace("\x1b[0m", "") == diff.to_text()
    assert diff.to_text().isascii()


def entry(module: str) -> NodeDiff:
    view = NodeView(name=module.replace(".", "_"), op="aten.linear", module=module)
    return NodeDiff(kind=Kind.REPLACED, before=view, after=replace(view, op="fxpress.linear"))


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_folding_loses_and_invents_nothing(points: set[tuple[int, int]]) -> None:
    entries = [entry(f"layers.{i}.experts.{j}.w") for i, j in sorted(points)]
    folds = fold(entries)
    assert sorted(e.module for f in folds for e in f.entries) == sorted(e.module for e in entries)
    assert len({f.path for f in folds}) == len(folds)


def test_ranges_name_gaps_and_products() -> None:
    assert [f.path for f in fold(entry(f"l.{i}.w") for i in (0, 1, 2, 5, 7, 8))] == ["l.[0-2,5,7-8].w"]
    assert [f.path for f in fold(entry(f"l.{i}.e.{j}.w") for i in range(3) for j in range(4))] == ["l.[0-2].e.[0-3].w"]
    assert [f.path for f in fold(map(entry, ["l.0.w", "l.0.v", "l.1.w"]))] == ["l.[0-1].w", "l.0.v"]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (538_060_288, "538.1 MB")])
def test_bytes_read_well(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(9_999, "9,999"), (25_000, "25.0 k"), (134_515_008, "134.5 M"), (7_000_000_000, "7.0 B")])
def test_counts_read_well(count: int, text: str) -> None:
    assert human_count(count) == text
