"""Slices of a nested model: equal to masking, one width or one a layer, heads, exports, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxpress
from fxpress.ir.axes import analyze_axes
from fxpress.ir.errors import PassError, SpecError
from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.slice import nested_sites

from ..masking import TOLERANCE, difference, double, masked, outputs
from ..tiny import fresh_program, tiny
from .nesting.nets import nested
from .test_nest import ARCHITECTURES


def sliced(program: Program, spec: str) -> Any:
    return fxpress.optimize(program, f"slice{{{spec}}}")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("spec", ["ratio=0.5", "heads=0.5"])
def test_a_slice_is_the_masked_full_model(name: str, spec: str) -> None:
    program = double(nested(name)[0], spread=0.0)
    result = sliced(program, spec)
    expected = program
    for taken in result.reports[0].taken:
        kept, size = int(taken.facts["kept"]), int(taken.facts["size"])
        expected = masked(expected, taken.site, torch.arange(kept, size))
    assert len(result.reports[0].taken) == 2 and result.program.parameters < program.parameters
    assert difference(outputs(result.program), outputs(expected)) < TOLERANCE
    other = tiny(name).other
    assert other is not None and all(torch.isfinite(t).all() for t in outputs(result.program, other))


def test_widths_of_layers_are_their_own() -> None:
    program = nested("llama")[0]
    result = sliced(program, "widths=[24,64]")
    sizes = [c.size for c in analyze_axes(result.program).classes if "mlp" in c.name]
    assert sizes == [24, 64] and "parameters" in result.reports[0].notes[0]
    same = sliced(program, "widths=[40]")
    assert [c.size for c in analyze_axes(same.program).classes if "mlp" in c.name] == [40, 40]
    twice = sliced(result.program, "widths=[24,32]")
    assert [s.why for s in twice.reports[0].skipped if "keeps all 24" in s.why]


def test_no_subtraction_is_left_where_it_was_cut(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    result = sliced(nested("vit")[0], "ratio=0.5,heads=0.5")
    assert not any(n.target is torch.ops.aten.sub.Tensor for n in result.program.graph.nodes)
    result.save(tmp_path / "small")
    assert difference(outputs(fxpress.load(tmp_path / "small").program), outputs(result.program)) == 0
    assert result.export_onnx(tmp_path / "small.onnx").max_error < 1e-4


def test_refusals() -> None:
    program = nested("llama")[0]
    assert len(nested_sites(program)) >= 4 and not nested_sites(fresh_program("llama"))
    with pytest.raises(PassError, match="in no order of importance, so a prefix of them is an arbitrary choice; put nest"):
        sliced(fresh_program("llama"), "ratio=0.5")
    assert sliced(fresh_program("llama"), "ratio=0.5,unsorted=true").program.parameters < program.parameters
    with pytest.raises(PassError, match="width 96 is more than the 88 units"):
        sliced(program, "widths=[96]")
    with pytest.raises(PassError, match="one for each of the 2 feed-forward layers, got 3"):
        sliced(program, "widths=[8,16,24]")
    for spec, text in (
        ("", "give ratio, widths or heads"), ("ratio=0.5,widths=[8]", "not both"), ("widths=[0]", "a width must be at least 1"),
        ("widths=[20]", "width 20 is no multiple of multiple_of=8"), ("ratio=1.5", "ratio"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=text):
            parse_pass(f"slice{{{spec}}}")
