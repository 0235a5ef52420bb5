"""Round to nearest: the half-step bound, every width, tied heads, zeros after pruning, refusals."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import FormatError, PassError, SpecError
from fxpress.ir.formats.affine import Affine
from fxpress.passes.base import parse_pass
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.quantize_rtn import QuantizeRtn
from fxpress.passes.ranges import RangeSearch

from .nets import conv_net, output_error, tied_net


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_moves_at_most_half_a_step(bits: int, symmetric: bool) -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [QuantizeRtn(bits=bits, group_size=8, symmetric=symmetric)], ctx).program
    for before, after in zip(program.sites(), done.sites(), strict=True):
        fmt = after.format
        assert isinstance(fmt, Affine)
        scale = fmt.unpack(after.payload(), after.rows, after.columns)[1]
        step = fmt.ungroup(scale.unsqueeze(-1).expand(-1, -1, 8).contiguous(), before.rows, before.columns)
        assert ((before.matrix() - after.matrix()).abs() <= 0.5 * step * 1.01 + 1e-6).all()


def test_mse_range_has_no_larger_error_than_min_max() -> None:
    program, ctx = conv_net()
    for site in program.sites():
        errors = []
        for search in RangeSearch:
            done = run_pipeline(program, [QuantizeRtn(bits=3, group_size=8, search=search, only=(site.name,))], ctx)
            errors.append(done.reports[0].taken[0].facts["relative_error"])
        assert errors[1] <= errors[0]


def test_tied_head_gets_its_own_codes_and_the_embedding_stays() -> None:
    program, ctx = tied_net()
    done = run_pipeline(program, [QuantizeRtn(bits=4, group_size=16)], ctx)
    sites = {s.name: s for s in done.program.sites()}
    assert sites["head"].compressed and not sites["embed"].compressed
    assert torch.equal(sites["embed"].matrix(), program.sites()[0].matrix())
    both = run_pipeline(program, [parse_pass("quantize_rtn{bits=8,kinds=[linear,embedding]}")], ctx)
    assert all(s.compressed for s in both.program.sites())
    assert output_error(program, both.program, ctx) < 0.01


def test_zeros_from_pruning_stay_zero_and_the_report_says_so() -> None:
    program, ctx = conv_net()
    passes = [parse_pass("prune_magnitude{sparsity=0.5}"), parse_pass("quantize_rtn{bits=4,group_size=8}")]
    done = run_pipeline(program, passes, ctx)
    pruned = run_pipeline(program, passes[:1], ctx).program
    for before, after in zip(pruned.sites(), done.program.sites(), strict=True):
        assert (after.matrix()[before.matrix() == 0] == 0).all()
    assert "all stayed exactly zero" in done.reports[1].notes[0]


def test_reported_bytes_are_the_stored_bytes() -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [QuantizeRtn(bits=3, group_size=8)], ctx)
    for result, site in zip(done.reports[0].taken, done.program.sites(), strict=True):
        assert result.bytes_after == site.nbytes == sum(t.nbytes for t in site.payload().values())
    assert done.reports[0].bytes_after == done.program.nbytes


def test_a_group_that_fits_nowhere_is_an_error_that_names_the_ways_out() -> None:
    program, ctx = conv_net()
    with pytest.raises(PassError, match=r"would touch nothing.*group_size=512 is wider"):
        run_pipeline(program, [QuantizeRtn(bits=4, group_size=512)], ctx)


def test_quantizing_twice_is_refused() -> None:
    program, ctx = conv_net()
    with pytest.raises(PassError, match="already holds affine"):
        run_pipeline(program, [QuantizeRtn(bits=4), QuantizeRtn(bits=8)], ctx)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("quantize_rtn{bits=9}", "must be <= 8"),
        ("quantize_rtn{bits=four}", "expected int"),
        ("quantize_rtn{bit=4}", "did you mean 'bits'"),
        ("quantize_rtm{bits=4}", "did you mean 'quantize_rtn'"),
        ("quantize_rtn{bits=4,search=best}", "expected one of"),
    ],
)
def test_bad_options_are_refused_by_name(spec: str, error: str) -> None:
    with pytest.raises(SpecError, match=error):
        parse_pass(spec)


def test_contradicting_granularity_is_refused() -> None:
    with pytest.raises(FormatError, match="does not go with"):
        parse_pass("quantize_rtn{bits=4,group_size=8,granularity=channel}")
