"""Edits: what they compute, what they leave alone, what they record, and that they keep a program valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor, record_all
from fxpress.ir.errors import EditError, FormatError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.formats.base import WeightFormat
from fxpress.ir.formats.dense import Dense, FloatType
from fxpress.ir.formats.lut import Lut
from fxpress.ir.journal import Action, Change, Journal
from fxpress.ir.nodes import get_tensor, op_name
from fxpress.ir.program import Program, Stage
from fxpress.ir.site_calls import why_not_compressible
from fxpress.ir.sites import WeightSite, site_named
from fxpress.ir.weights import named_tensors

from ..checks import assert_closer, assert_same, compress, relative_error
from ..tiny import SMALL, TinyModel, fresh_program, randn

FORMATS: tuple[WeightFormat, ...] = (Affine(bits=4, group_size=4), Affine(bits=3), Affine(bits=8, symmetric=True), Dense(storage=FloatType.FLOAT16), Dense())


def rounded(site: WeightSite, fmt: WeightFormat) -> Tensor:
    return fmt.decode(fmt.encode(site.matrix()), site.rows, site.columns, site.dtype)


@pytest.mark.parametrize("model", [*SMALL, "gpt2", "llama_tied", "mobilenet_v2"])
def test_compressing_every_site_is_setting_every_decoded_weight(model: str, captured: Callable[[str], Program], zoo: Callable[[str], TinyModel]) -> None:
    program, reference, fmt = captured(model), captured(model), Affine(bits=4)
    before = program.sites()
    assert all(why_not_compressible(s) is None for s in before)
    wanted = {s.name: rounded(s, fmt) for s in before}
    with Editor(reference, "test") as editor:
        for name in wanted:
            compress(program, site_named(program, name), fmt)
            editor.set_matrix(site_named(reference, name), wanted[name], "why")
    program.verify()
    assert [s.name for s in program.sites()] == list(wanted)
    assert all(s.compressed for s in program.sites())
    call = zoo(model).other or zoo(model).call
    torch.testing.assert_close(program.run_inputs(call), reference.run_inputs(call), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["conv1d", "embedding"])
def test_compressed_programs_re_export_bit_equal(model: str, captured: Callable[[str], Program], zoo: Callable[[str], TinyModel]) -> None:
    program, call = captured(model), zoo(model).other
    assert call is not None
    for site in program.sites():
        compress(program, site_named(program, site.name), FORMATS[0])
    exported = program.to_exported()
    assert sum(op_name(n).startswith("fxpress.") for n in exported.graph.nodes) == len(program.sites())
    assert_same(exported.module()(*call[0]), program.run_inputs(call))
    again = capture(exported)
    assert again.stage is Stage.COMPRESSED
    assert_same(again.run_inputs(call), program.run_inputs(call))
    assert [(s.name, s.kind, s.dtype, s.format, s.nbytes) for s in again.sites()] == [(s.name, s.kind, s.dtype, s.format, s.nbytes) for s in program.sites()]


def test_compress_records_what_was_and_what_is(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    with Editor(program, "quantize{bits=4}") as editor:
        site = site_named(program, "up")
        editor.compress(site, FORMATS[0], FORMATS[0].encode(site.matrix()), "fits", {"error": 0.1})
    assert program.stage is Stage.COMPRESSED
    (change,) = program.journal.changes
    assert (change.pass_spec, change.action, change.why, dict(change.facts)) == ("quantize{bits=4}", Action.REPLACED, "fits", {"error": 0.1})
    assert change.before is not None and change.after is not None
    assert (change.before.name, change.before.op, change.before.format, change.before.nbytes) == ("linear", "aten.linear", "dense", 960)
    assert (change.after.name, change.after.op, change.after.format) == ("linear", "fxpress.linear", "affine{bits=4,group_size=4}")
    assert change.after.nbytes == site_named(program, "up").nbytes == sum(t.nbytes for t in site_named(program, "up").payload().values())
    assert change.after.inputs == change.before.inputs == ("x",)
    assert Change.from_dict(change.to_dict()) == change


def test_compress_drops_the_dense_weight_and_keeps_the_bias(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    bytes_before = program.nbytes
    compress(program, site_named(program, "up"), FORMATS[0])
    assert {n for n, _ in named_tensors(program.graph_module)} == {
        "up.weight_codes", "up.weight_scale", "up.weight_zero_point", "up.bias", "down.weight",
    }  # fmt: skip
    assert program.nbytes == bytes_before - 960 + site_named(program, "up").nbytes


def test_nodes_keep_name_and_provenance(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    compress(program, site_named(program, "up"), FORMATS[0])
    node = site_named(program, "up").node
    assert node.name == "linear"
    assert node.meta["from_node"][0].name == "linear"
    assert "test" in node.meta["from_node"][0].pass_name
    assert len({n.name for n in program.graph.nodes}) == len(program.graph.nodes)


def test_decompress_is_exact_and_runs_the_plain_operator(captured: Callable[[str], Program]) -> None:
    for model in SMALL:
        program = captured(model)
        for site in program.sites():
            compress(program, site_named(program, site.name), FORMATS[0])
        expected = program.run_examples()
        for site in program.sites():
            with Editor(program, "test") as editor:
                editor.decompress(site_named(program, site.name), "why")
        program.verify()
        assert not any(s.compressed for s in program.sites())
        torch.testing.assert_close(program.run_examples(), expected)


def test_decompress_leaves_the_weight_of_other_users_alone(captured: Callable[[str], Program]) -> None:
    program = captured("repeated")
    kept = site_named(program, "step#2").matrix().clone()
    compress(program, site_named(program, "step"), FORMATS[1])
    with Editor(program, "test") as editor:
        editor.decompress(site_named(program, "step"), "why")
    assert [s.name for s in program.sites()] == ["step", "step#2", "step#3"]
    assert_same(site_named(program, "step#2").matrix(), kept)
    assert not torch.equal(site_named(program, "step").matrix(), kept)


@pytest.mark.parametrize("model", ["embedding", "gpt2"])
def test_set_matrix_reaches_tied_sites_and_untie_parts_them(model: str, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    site = next(s for s in program.sites() if s.tied)
    other, new = site.tied[0], randn(site.rows, site.columns, seed=9)
    with Editor(program, "test") as editor:
        editor.set_matrix(site, new, "why")
    assert_same(site_named(program, other).matrix(), new)
    assert program.parameters == captured(model).parameters
    with Editor(program, "test") as editor:
        editor.untie(site_named(program, site.name))
        editor.set_matrix(site_named(program, site.name), new + 1, "why")
    assert_same(site_named(program, site.name).matrix(), new + 1)
    assert_same(site_named(program, other).matrix(), new)
    assert site_named(program, other).tied == ()
    program.verify()


def test_clones_do_not_see_edits(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    clone, before = program.clone(), program.run_examples()
    compress(clone, site_named(clone, "up"), FORMATS[1])
    with Editor(clone, "test") as editor:
        editor.set_matrix(site_named(clone, "down"), torch.zeros(6, 20), "why")
    assert_same(program.run_examples(), before)
    assert program.journal == Journal()
    assert program.stage is Stage.CAPTURED


def test_clones_share_tensors(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    assert get_tensor(program.clone().graph_module, "up.weight") is get_tensor(program.graph_module, "up.weight")


def test_bypass_removes_a_node(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    relu = next(n for n in program.graph.nodes if n.name == "relu")
    with Editor(program, "test") as editor:
        editor.bypass(relu, relu.args[0], "linear now")
    up, down = (s.matrix() for s in program.sites())
    x, bias = program.inputs.leaves[0], get_tensor(program.graph_module, "up.bias")
    torch.testing.assert_close(program.run_examples(), F.linear(F.linear(x, up, bias), down))
    change = program.journal.changes[-1]
    assert change.action is Action.REMOVED and change.after is None
    assert change.before is not None and change.before.op == "aten.relu"


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda e, s: e.set_matrix(s, torch.zeros(2, 2), ""), EditError, r"set_matrix at up \(linear \[20, 12\]\): expected a plain site and \[20, 12\]"),
        (lambda e, s: e.set_bias(s, torch.zeros(3), ""), EditError, r"set_bias at up .*: expected a bias \[20\], got \[3\]"),
        (lambda e, s: e.compress(s, Dense(), {"codes": s.matrix()}, ""), FormatError, "payload of dense at up"),
    ],
)
def test_wrong_edits_are_refused_and_change_nothing(
    act: Callable[[Editor, WeightSite], Any], error: type[Exception], message: str, captured: Callable[[str], Program]
) -> None:
    program = captured("mlp")
    before = program.to_text()
    with pytest.raises(error, match=message), Editor(program, "test") as editor:
        act(editor, program.sites()[0])
    assert program.to_text() == before
    assert program.journal == Journal()
    program.verify()


def test_compressed_sites_refuse_edits_of_plain_ones(captured: Callable[[str], Program]) -> None:
    program = captured("embedding")
    compress(program, site_named(program, "head"), Dense())
    site = site_named(program, "head")
    assert "already holds dense; start from the uncompressed program" in str(why_not_compressible(site))
    acts: list[Callable[[Editor], Any]] = [
        lambda e: e.set_matrix(site, site.matrix(), ""),
        lambda e: e.untie(site),
        lambda e: e.compress(site, Dense(), site.payload(), ""),
    ]
    for act in acts:
        with pytest.raises(EditError), Editor(program, "test") as editor:
            act(editor)


def test_overlapping_views_are_refused() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    second.weight = nn.Parameter(first.weight.detach()[:2])
    program = capture(nn.Sequential(first, second), randn(2, 4))
    with pytest.raises(EditError, match=r"is a view into storage that 1\.weight also uses"), Editor(program, "test") as editor:
        editor.set_matrix(program.sites()[0], torch.zeros(4, 4), "why")


def test_compressed_sites_are_as_close_to_double_precision_as_plain_ones(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    bias = get_tensor(program.graph_module, "up.bias").detach()
    for site in program.sites():
        compress(program, site_named(program, site.name), Affine(bits=8))
    up, down = (s.matrix() for s in program.sites())
    x = program.inputs.leaves[0]
    reference = F.linear(F.linear(x.double(), up.double(), bias.double()).relu(), down.double())
    assert_closer(reference, program.run_examples(), F.linear(F.linear(x, up, bias).relu(), down))
    dense = captured("mlp").run_examples()
    assert 1e-4 < relative_error(program.run_examples(), dense) < 0.02  # 8 bits: seen, and small


def test_record_all_lists_every_node(captured: Callable[[str], Program]) -> None:
    records = record_all(captured("mlp"))
    assert [r.name for r in records] == ["x", "linear", "relu", "linear_1", "output"]
    assert [r.parameters for r in records] == [0, 240, 0, 120, 0]


EDITS = st.lists(st.tuples(st.sampled_from(["compress", "decompress", "set_matrix", "untie", "set_bias"]), st.integers(0, 9), st.integers(0, 4)), max_size=6)


def attempt(program: Program, action: str, site: WeightSite, choice: int) -> None:
    """One edit if it is legal at this site."""
    with Editor(program, f"edit{choice}") as editor:
        if action == "compress" and why_not_compressible(site) is None and FORMATS[choice].why_illegal(site.rows, site.columns) is None:
            editor.compress(site, FORMATS[choice], FORMATS[choice].encode(site.matrix()), "why")
        elif action == "decompress" and site.compressed:
            editor.decompress(site, "why")
        elif action == "set_matrix" and not site.compressed:
            editor.set_matrix(site, site.matrix() * 0.5, "why")
        elif action == "untie" and site.tied and not site.compressed:
            editor.untie(site)
        elif action == "set_bias" and site.kind.value not in ("mm", "embedding"):
            editor.set_bias(site, randn(site.rows, seed=choice), "why")


@settings(max_examples=40)
@given(st.sampled_from(SMALL), EDITS)
def test_random_edits_keep_a_program_valid(model: str, edits: list[tuple[str, int, int]]) -> None:
    program = fresh_program(model)
    names = [s.name for s in program.sites()]
    for action, index, choice in edits:
        attempt(program, action, program.sites()[index % len(names)], choice)
        program.verify()
        assert [s.name for s in program.sites()] == names
    weights = {s.name: s.matrix() for s in program.sites()}
    assert program.nbytes >= sum(s.nbytes for s in program.sites() if s.compressed)
    assert_same(program.clone().run_examples(), program.run_examples())
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    assert all(Change.from_dict(c.to_dict()) == c for c in program.journal.changes)


def test_a_payload_in_another_order_is_stored_in_the_formats_order() -> None:
    program = fresh_program("mlp")
    site = program.sites()[0]
    fmt = Lut(entries=8)
    payload = fmt.encode(site.matrix())
    with Editor(program, "test") as editor:
        editor.compress(site, fmt, dict(reversed(list(payload.items()))), "test")
    assert_same(program.sites()[0].payload(), payload)


def test_a_program_moves_and_leaves_its_original_where_it_is(captured: Callable[[str], Program]) -> None:
    program = captured("embedding")
    moved = program.to("meta")
    tensors = dict(named_tensors(moved.graph_module))
    assert {t.device.type for t in tensors.values()} == {"meta"} and {t.device.type for t in moved.inputs.leaves} == {"meta"}
    assert moved.device.type == "meta" and program.device.type == "cpu"
    assert {n.meta["val"].device.type for n in moved.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)} == {"meta"}
    assert moved.inputs.placed({"x": torch.zeros(2)})["x"].device.type == "meta"
    assert all(t.device.type == "cpu" for _, t in named_tensors(program.graph_module))
    for one, other in (s.tensors + t.tensors for s in program.sites() for t in program.sites() if t.name in s.tied):
        assert tensors[one] is tensors[other]
