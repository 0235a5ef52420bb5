"""Zeros stored as such: lossless, smaller, in the form that fits, or skipped with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.errors import PassError, SpecError
from fxpress.passes.base import Guarantee, parse_pass

from ..checks import assert_same


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.Linear(32, 32))


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def _run(*recipe: str, store: str = "store_sparse") -> tuple[fxpress.Result, fxpress.Result]:
    """The result without and with the zeros dropped."""
    return fxpress.optimize(_net(), list(recipe), example_inputs=(X,)), fxpress.optimize(_net(), [*recipe, store], example_inputs=(X,))


@pytest.mark.parametrize(
    ("recipe", "form"),
    [
        (("prune_magnitude{sparsity=0.5}",), "bitmap"),
        (("prune_magnitude{pattern=16:32}",), "balanced"),
        (("prune_magnitude{pattern=2:4}",), "nm"),
        (("prune_magnitude{pattern=16:32}", "quantize_rtn{bits=4,group_size=32}"), "balanced"),
        (("prune_magnitude{sparsity=0.8}", "quantize_rtn{bits=8}"), "bitmap"),
        (("prune_magnitude{pattern=2:4}", "quantize_lut{bits=4,sensitivity=uniform,refine=off}"), "nm"),
    ],
)
def test_nothing_changes_but_the_size(recipe: tuple[str, ...], form: str) -> None:
    before, after = _run(*recipe)
    assert_same(after.program.run(X), before.program.run(X))
    assert {s.format.name for s in after.program.sites()} == {form}
    assert after.program.nbytes < before.program.nbytes
    report = after.reports[-1]
    assert report.guarantee is Guarantee.EXACT and len(report.taken) == 3 and report.bytes_after == after.program.nbytes
    assert all(0.3 < t.facts["sparsity"] < 0.95 for t in report.taken)


def test_half_of_four_bits_takes_three() -> None:
    _, after = _run("prune_magnitude{pattern=16:32}", "quantize_rtn{bits=4}")
    assert after.reports[-1].taken[0].facts["bits_per_weight"] == 3.0 + (16 + 8) / 64  # a scale and a zero point a row


def test_a_demanded_form_that_does_not_hold_the_weight_is_skipped() -> None:
    with pytest.raises(PassError, match=r"nm does not hold it: 2 of 4 columns are kept, and a group has [34] that are not zero"):
        _run("prune_magnitude{sparsity=0.5}", store="store_sparse{format=nm}")
    _, after = _run("prune_magnitude{pattern=2:4}", store="store_sparse{format=balanced,keep=20}")
    assert after.program.sites()[0].format.to_spec() == "balanced{keep=20}"


def test_what_gains_nothing_is_skipped_with_both_sizes() -> None:
    with pytest.raises(PassError, match=r"would take [\d,]+ bytes sparse, [\d,]+ as it is"):
        _run("prune_magnitude{sparsity=0.01}")
    with pytest.raises(PassError, match="has no zeros; prune it first"):
        fxpress.optimize(_net(), ["store_sparse"], example_inputs=(X,))
    twice = fxpress.optimize(_net(), ["prune_magnitude{sparsity=0.5}", "store_sparse", "store_sparse{allow_empty=true}"], example_inputs=(X,))
    assert all("only dense, affine and lut weights" in s.why for s in twice.reports[-1].skipped)


def test_dry_runs_know_that_zeros_will_come() -> None:
    dry = fxpress.optimize(_net(), ["prune_magnitude{sparsity=0.5}", "quantize_rtn{bits=4}", "store_sparse"], example_inputs=(X,), dry_run=True)
    assert [d.action for d in dry.passes[-1].plan.decisions] == ["store the zeros as such (the size depends on them)"] * 3


def test_saved_and_loaded(tmp_path: Path) -> None:
    _, result = _run("prune_magnitude{sparsity=0.6}", "quantize_rtn{bits=4}")
    result.save(tmp_path / "artifact")
    loaded = fxpress.load(tmp_path / "artifact")
    assert_same(loaded.program.run(X), result.program.run(X))
    assert [s.format for s in loaded.program.sites()] == [s.format for s in result.program.sites()]


def test_tied_weights_get_payloads_of_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    result = fxpress.optimize(Tied(), ["prune_magnitude{sparsity=0.5,untie=true}", "store_sparse"], example_inputs=(torch.arange(4),))
    assert [s.format.name for s in result.program.sites()] == ["dense", "bitmap"]


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(SpecError, match="keep and group go with format=balanced or nm"):
        parse_pass("store_sparse{keep=16}")
