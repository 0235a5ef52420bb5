"""Centred inputs: the same function, undone exactly, and never where it cannot be."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.centres import centre, centre_of, fold_centre, why_not_centred
from fxpress.ir.edit import Editor
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.sites import WeightSite

from ..masking import TOLERANCE, difference, double, outputs
from ..tiny import fresh_program, randn


def site_of(program: Program, name: str) -> WeightSite:
    return next(s for s in program.sites() if s.name == name)


@pytest.mark.parametrize(("model", "name"), [("mlp", "up"), ("mlp", "down"), ("gpt2", "transformer.h.0.mlp.c_proj")])
def test_centring_changes_nothing_and_is_undone(model: str, name: str) -> None:
    program = double(fresh_program(model))
    centred = program.clone()
    site, mean = site_of(centred, name), randn(site_of(centred, name).columns, seed=3)
    with Editor(centred, "test") as editor:
        centre(editor, site, mean, "why")
    centred.verify()
    assert centre_of(site_of(centred, name)) == f"{name}.centre" and why_not_centred(site_of(centred, name)) == "its inputs are centred already"
    assert difference(outputs(centred), outputs(program)) < TOLERANCE
    folded = centred.clone()
    with Editor(folded, "test") as editor:
        fold_centre(editor, site_of(folded, name), "why")
    folded.verify()
    assert difference(outputs(folded), outputs(program)) < TOLERANCE and centre_of(site_of(folded, name)) is None
    assert len(folded.graph.nodes) <= len(program.graph.nodes) + 1  # a bias may have come


def test_cut_down_it_adds_what_is_missing_on_average() -> None:
    program = double(fresh_program("mlp"))
    mean = randn(20, seed=5).double()
    with Editor(program, "test") as editor:
        centre(editor, site_of(program, "down"), mean, "why")
    full = get_tensor(program.graph_module, "down.bias").detach()
    torch.testing.assert_close(full, get_tensor(program.graph_module, "down.weight").detach() @ mean)


def test_what_cannot_be_centred_says_why() -> None:
    program = fresh_program("conv")
    assert why_not_centred(site_of(program, "conv1")) == "only plain linear layers are"
    fold_before = len(program.graph.nodes)
    with Editor(program, "test") as editor:
        fold_centre(editor, site_of(program, "head"), "why")
    assert len(program.graph.nodes) == fold_before
