"""GPTQ against a plain float64 implementation of its algorithm, against rounding, and with zeros, groups and sharing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxpress.ir.formats.affine import Affine
from fxpress.ir.program import Program
from fxpress.passes import stage
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import CalibrationWalk
from fxpress.passes.context import Call
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.quantize_gptq import QuantizeGptq, factor

from .nets import conv_net, output_error, tied_net


def reference_gptq(weight: Tensor, gram: Tensor, fmt: Affine, damping: float) -> Tensor:
    """Algorithm 1 of the paper, one column at a time, by eliminating columns from the inverse (no Cholesky): `[N, K]` dequantized."""
    w, h = weight.double().clone(), gram.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    scale, zero = (t.double() for t in fmt.min_max(weight))
    inverse = torch.linalg.inv(h)
    out = torch.empty_like(w)
    for i in range(w.shape[1]):
        g = i // fmt.group_width(w.shape[1])
        code = (w[:, i] / scale[:, g] + zero[:, g]).round().clamp(0, fmt.levels - 1)
        out[:, i] = (code - zero[:, g]) * scale[:, g]
        w[:, i + 1 :] -= ((w[:, i] - out[:, i]) / inverse[i, i]).outer(inverse[i, i + 1 :])
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0.0
        inverse[i, i] = 1.0
    return out


def test_equals_the_papers_algorithm_in_storage_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 160) @ torch.randn(160, 160) / 10
    weight, gram = torch.randn(24, 160), x.T @ x / len(x)
    one = QuantizeGptq(bits=4, act_order=False, search="minmax")  # type: ignore[arg-type]
    solver = factor(gram, damping=0.01, act_order=False, where="test")
    codes, scale, zero = one._columns(one.affine(4), weight, solver, *one.affine(4).min_max(weight))
    got = one.affine(4).dequantize(codes, scale, zero).double()
    want = reference_gptq(weight, gram, one.affine(4), 0.01)
    agreement = (got - want).abs() < 1e-4
    assert agreement.double().mean() > 0.995  # float32 may flip a rounding tie, and what follows it in that row


@pytest.mark.parametrize("spec", ["{bits=4,group_size=8}", "{bits=3,group_size=8,symmetric=true}", "{bits=3}", "{bits=4,group_size=8,act_order=false}"])
def test_beats_rounding_on_the_output(spec: str) -> None:
    program, ctx = conv_net()
    gptq = run_pipeline(program, [parse_pass("quantize_gptq" + spec)], ctx).program
    rtn = run_pipeline(program, [parse_pass("quantize_rtn" + spec.replace(",act_order=false", ""))], ctx).program
    assert output_error(program, gptq, ctx) < 0.8 * output_error(program, rtn, ctx)


def test_zeros_from_pruning_stay_zero() -> None:
    program, ctx = conv_net()
    passes = [parse_pass("prune_wanda{sparsity=0.5}"), parse_pass("quantize_gptq{bits=4,group_size=8}")]
    done = run_pipeline(program, passes, ctx)
    for site, result in zip(done.program.sites(), done.reports[0].taken, strict=True):
        assert float((site.matrix() == 0).float().mean()) >= result.facts["sparsity"] - 1e-6
    assert "all stayed exactly zero" in done.reports[1].notes[0]


def test_dead_inputs_are_simply_rounded() -> None:
    gram = torch.zeros(6, 6)
    gram[:3, :3] = torch.eye(3)
    weight = torch.randn(4, 6)
    one = QuantizeGptq(bits=4)
    codes, scale, zero = one._columns(one.affine(4), weight, factor(gram, damping=0.01, act_order=True, where="test"), *one.affine(4).min_max(weight))
    assert torch.equal(codes, one.affine(4).quantize(weight, scale, zero))


def test_embedding_is_skipped_with_a_reason_and_the_tied_head_is_taken() -> None:
    program, ctx = tied_net()
    done = run_pipeline(program, [parse_pass("quantize_gptq{bits=4,group_size=16}")], ctx)
    assert [t.site for t in done.reports[0].taken] == ["up", "down", "head"]
    assert [s.site for s in done.reports[0].skipped] == ["embed"]


def test_runs_are_deterministic_and_the_modes_differ() -> None:
    program, ctx = conv_net()
    outs = [run_pipeline(program, [parse_pass(f"quantize_gptq{{bits=3,group_size=8,sequential={s}}}")], ctx).program for s in ("true", "true", "false")]
    payloads = [[t for site in o.sites() for t in site.payload().values()] for o in outs]
    assert all(torch.equal(a, b) for a, b in zip(payloads[0], payloads[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(payloads[0], payloads[2], strict=True))


def test_calibration_walk_is_shared_with_a_neighbour_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []

    class Counting(CalibrationWalk):
        def __init__(self, program: Program, calls: Sequence[Call]) -> None:
            walks.append(program)
            super().__init__(program, calls)

    monkeypatch.setattr(stage, "CalibrationWalk", Counting)
    program, ctx = conv_net()
    run_pipeline(program, [parse_pass("prune_wanda{sparsity=0.5}"), parse_pass("quantize_gptq{bits=4,group_size=8}")], ctx)
    assert len(walks) == 1
