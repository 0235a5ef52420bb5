"""The options all pruning passes share: `unstructured` spelled out, sparsity beside a pattern, and large balanced groups."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import SpecError
from fxpress.passes.base import parse_pass
from fxpress.passes.pipeline import run_pipeline

from .nets import conv_net, tied_net

NAMES = ("prune_magnitude", "prune_wanda", "prune_sparsegpt")


@pytest.mark.parametrize("name", NAMES)
def test_unstructured_is_the_default_pattern(name: str) -> None:
    spelled = parse_pass(f"{name}{{sparsity=0.5,pattern=unstructured}}")
    assert spelled == parse_pass(f"{name}{{sparsity=0.5}}")
    assert spelled.to_spec() == f"{name}{{sparsity=0.5}}"
    assert parse_pass(spelled.to_spec()) == spelled


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("sparsity", "pattern"), [("0.5", "2:4"), ("0.5", "16:32"), ("0.333", "2:3"), ("0.25", "3:4")])
def test_a_sparsity_that_agrees_with_the_pattern_is_taken(name: str, sparsity: str, pattern: str) -> None:
    both = parse_pass(f"{name}{{sparsity={sparsity},pattern={pattern}}}")
    assert both == parse_pass(f"{name}{{pattern={pattern}}}")
    assert parse_pass(both.to_spec()) == both


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", r"give a sparsity or an N:M pattern, for example \w+\{sparsity=0.5\}"),
        ("pattern=unstructured", "give a sparsity"),
        ("sparsity=0.6,pattern=2:4", r"sparsity=0.6 and pattern=2:4 contradict each other: 2:4 removes 0.5; leave one out, or write pattern=unstructured"),
        ("sparsity=0.5,pattern=structured", "expected N:M .* or unstructured"),
        ("sparsity=1.0", "must be < 1"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_pass(f"{name}{{{options}}}")


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_of_thirty_two_is_exact_in_every_row(name: str) -> None:
    program, ctx = tied_net()
    outcome = run_pipeline(program, [parse_pass(f"{name}{{pattern=16:32}}")], ctx)
    sites = {s.name: s for s in outcome.program.sites()}
    for site in ("up", "down"):
        assert ((sites[site].matrix().unflatten(1, (-1, 32)) == 0).sum(-1) == 16).all()
    assert [t.facts["sparsity"] for t in outcome.reports[0].taken] == [0.5, 0.5]


@pytest.mark.parametrize("name", NAMES)
def test_columns_that_the_pattern_does_not_divide_are_skipped_with_the_reason(name: str) -> None:
    program, ctx = conv_net()
    outcome = run_pipeline(program, [parse_pass(f"{name}{{pattern=16:32}}")], ctx)
    assert {s.site: s.why for s in outcome.reports[0].skipped} == {
        n: f"pattern 16:32 does not divide its {k} columns" for n, k in (("conv", 27), ("depthwise", 9), ("head", 40))
    }
    assert torch.equal(outcome.program.sites()[0].matrix(), program.sites()[0].matrix())
