"""Compensation: optimal, exact where it can be, and never worse than doing nothing."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.edit import Editor
from fxpress.passes.structured.compensate import Compensation, Moments, choose_ridge, compensate, refit
from fxpress.passes.structured.obs import damped

from .nets import Builder, groups_of, hidden_inputs, mlp, redundant


def _compensated(build: Builder, keep: torch.Tensor, how: Compensation) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Outputs on the calibration data before and after."""
    program, ctx = build()
    rows = torch.cat([call[0][0] for call in ctx.calibration])[: program.inputs.args[0].shape[0]]
    before = program.run(rows)
    with Editor(program, "test") as editor:
        errors = compensate(editor, {groups_of(program)[0]: keep}, how, ctx)
    return before, program.run(rows), errors


def test_redundant_units_are_made_up_for() -> None:
    before, after, errors = _compensated(redundant, torch.arange(4), Compensation.WEIGHTS)
    assert float((before - after).norm() / before.norm()) < 0.05
    assert errors["down"] < 0.05


def test_weights_beat_bias_beats_nothing() -> None:
    keep = torch.arange(10)
    before, refitted, _ = _compensated(mlp, keep, Compensation.WEIGHTS)
    _, shifted, _ = _compensated(mlp, keep, Compensation.BIAS)
    program, _ = mlp()
    site = next(s for s in program.sites() if s.name == "down")
    zeroed = program.clone()
    with Editor(zeroed, "test") as editor:
        matrix = site.matrix().clone()
        matrix[:, 10:] = 0
        editor.set_matrix(next(s for s in zeroed.sites() if s.name == "down"), matrix, "zeroed")
    rows = torch.cat([call[0][0] for call in mlp()[1].calibration])[:64]
    errors = [float((before - x).norm()) for x in (refitted, shifted, zeroed.run(rows))]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


def test_bias_keeps_the_mean_output() -> None:
    program, ctx = mlp()
    x = hidden_inputs(program, ctx)
    down = next(s for s in program.sites() if s.name == "down").matrix().double()
    with Editor(program, "test") as editor:
        compensate(editor, {groups_of(program)[0]: torch.arange(5)}, Compensation.BIAS, ctx)
    site = next(s for s in program.sites() if s.name == "down")
    assert site.bias is not None
    bias = dict(program.graph_module.named_buffers())[site.bias].double()
    torch.testing.assert_close((x @ site.matrix().double().t() + bias).mean(0), (x @ down.t()).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stays", [[0, 1, 2], [5], list(range(8))])
def test_refit_is_the_least_squares_optimum(stays: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 8, generator=generator, dtype=torch.float64)
    weight, gram = torch.randn(3, 8, generator=generator, dtype=torch.float64), x.t() @ x / 300
    mask = torch.isin(torch.arange(8), torch.tensor(stays))
    new = refit(weight, gram, mask, 1e-2)
    assert (new[:, ~mask] == 0).all()
    slope = (damped(gram) @ (weight - new).t())[mask]
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)
    assert torch.equal(refit(weight, gram, mask, float("inf")), weight * mask)


def test_the_ridge_grows_when_rows_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    weight, stays = torch.randn(3, 40, generator=generator, dtype=torch.float64), torch.arange(40) >= 10

    def ridge(rows: int) -> float:
        parts = [torch.randn(rows, 40, generator=generator, dtype=torch.float64) @ mixing for _ in range(2)]
        return choose_ridge(weight, [Moments(x.mean(0), x.t().cov(correction=0)) for x in parts], stays)

    assert ridge(4000) < 0.1 < ridge(12)
