"""Mixed precision: within the budget, better than one width for all, followed by every quantizer, and every refusal."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import PassError, SpecError
from fxpress.ir.program import Program
from fxpress.ir.sites import WeightSite
from fxpress.passes.allocate_bits import AllocateBits
from fxpress.passes.base import parse_pass
from fxpress.passes.context import Context
from fxpress.passes.pipeline import Outcome, plan_passes, run_pipeline

from .nets import conv_net, output_error, tied_net


def run(net: tuple[Program, Context], *specs: str) -> Outcome:
    return run_pipeline(net[0], [parse_pass(s) for s in specs], net[1])


def stored(sites: tuple[WeightSite, ...]) -> int:
    return sum(s.nbytes for s in sites if s.compressed)


@pytest.mark.parametrize("follower", ["quantize_lut", "quantize_gptq{group_size=8}", "quantize_rtn{group_size=8}"])
@pytest.mark.parametrize("budget", ["5.5bits", "7KB"])
def test_quantizers_follow_within_the_budget(follower: str, budget: str) -> None:
    program, ctx = conv_net()
    out = run((program, ctx), f"allocate_bits{{budget={budget},quantizer='{follower}'}}", follower)
    limit = 7000 if budget == "7KB" else 5.5 / 8 * sum(s.parameters for s in program.sites() if s.name in {r.site for r in out.reports[0].taken})
    taken = {r.site: r for r in out.reports[0].taken}
    assert stored(out.program.sites()) <= limit
    assert len({r.facts["bits"] for r in taken.values()}) > 1 or follower == "quantize_lut"
    for result in out.reports[1].taken:
        assert result.bytes_after == taken[result.site].facts["planned_bytes"]
    assert sum(r.facts["planned_bytes"] for r in taken.values()) == stored(out.program.sites())
    assert "bits a weight" in out.reports[0].notes[0]


def test_mixed_is_better_than_one_width_at_the_same_bytes() -> None:
    program, ctx = conv_net()
    even = run((program, ctx), "quantize_rtn{bits=3,group_size=8}")
    plan = f"allocate_bits{{budget={stored(even.program.sites())}B,quantizer='quantize_rtn{{group_size=8}}'}}"
    mixed = run((program, ctx), plan, "quantize_rtn{group_size=8}")
    assert stored(mixed.program.sites()) <= stored(even.program.sites())
    assert output_error(program, mixed.program, ctx) < output_error(program, even.program, ctx)


def test_swaps_never_raise_the_true_loss() -> None:
    program, ctx = tied_net()
    plain, swapped = (f"allocate_bits{{budget=4bits,quantizer='quantize_rtn',swaps={n}}}" for n in (0, 12))
    bits = [[r.facts["bits"] for r in run((program, ctx), s, "quantize_rtn").reports[0].taken] for s in (plain, swapped)]
    assert len(bits[0]) == len(bits[1])
    assert run((program, ctx), swapped, "quantize_rtn").program.nbytes <= run((program, ctx), "quantize_rtn{bits=5}").program.nbytes


def test_no_weight_changes_and_the_plan_is_data() -> None:
    program, ctx = conv_net()
    planned = plan_passes(program, [parse_pass("allocate_bits{budget=4bits}")], ctx)[0]
    assert planned.bytes_before == planned.bytes_after
    assert all(d.facts["bits"] in (2, 3, 4, 8) for d in planned.plan.decisions)
    out = run((program, ctx), "allocate_bits{budget=4bits}")
    assert all(torch.equal(a.matrix(), b.matrix()) for a, b in zip(out.program.sites(), program.sites(), strict=True))


def test_options_of_the_quantizer_win_and_patterns_narrow() -> None:
    program, ctx = conv_net()
    out = run((program, ctx), "allocate_bits{budget=4bits,only=[h*]}", "quantize_rtn{bits=8,only=[conv]}", "quantize_lut{only=[h*]}")
    assert {r.site for r in out.reports[0].taken} == {"hidden", "head"}
    assert [r.site for r in out.reports[1].taken] == ["conv"] and [r.site for r in out.reports[2].taken] == ["hidden", "head"]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("allocate_bits", SpecError, "budget"),
        ("allocate_bits{budget=lots}", SpecError, "expected bits a weight"),
        ("allocate_bits{budget=0}", SpecError, "expected bits a weight"),
        ("allocate_bits{budget=4,quantizer=prune_wanda}", SpecError, "for example"),
        ("allocate_bits{budget=4,quantizer='quantize_rtn{bits=4}'}", SpecError, "without bits="),
        ("allocate_bits{budget=4,widths=[2,2]}", SpecError, "different numbers"),
        ("allocate_bits{budget=1.5bits}", PassError, "least"),
    ],
)
def test_refusals_say_what_to_do(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(conv_net(), spec)


def test_the_budget_is_read_in_bits_or_bytes() -> None:
    assert AllocateBits(budget=3.5).to_spec() == "allocate_bits{budget=3.5}"
    assert parse_pass("allocate_bits{budget=3.5bits}") == AllocateBits(budget="3.5bits")
