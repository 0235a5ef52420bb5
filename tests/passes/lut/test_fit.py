"""Fits: what is stored is what is fitted, shared tables, pinned zeros, kept weights, and refinement that never gets worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.ir.formats.lut import Lut, TableType
from fxpress.passes.lut.fit import Fit, Problem, fit_tables, refine_tables

from ...tiny import randn, seeded

FORMATS = [
    Lut(entries=8),
    Lut(entries=5),
    Lut(entries=8, table=TableType.FLOAT16),
    Lut(entries=8, rows_per_table=4),
    Lut(entries=8, rows_per_table=None),
    Lut(entries=8, rows_per_table=5, table=TableType.FLOAT32),
]


def problem(fmt: Lut, *, kept: float = 0.0, pruned: float = 0.0) -> tuple[Problem, list[Tensor]]:
    x = randn(300, 64) @ randn(64, 64, seed=1)
    rough = torch.rand(12, 64, generator=seeded(3))
    matrix = (randn(12, 64, seed=2) * torch.logspace(-1, 1, 12).unsqueeze(1)).masked_fill(rough < pruned, 0.0)
    grams = [x.t() @ x / 300, (x * x.abs()).t() @ x / 300 + x.t() @ x / 100]
    grams[1] = (grams[1] + grams[1].t()) / 2 + 50 * torch.eye(64)
    return Problem(matrix=matrix, weights=randn(12, 64, seed=4).square(), kept=rough > 1 - kept, pruned=matrix == 0, fmt=fmt, parts=(6, 6)), grams


def decoded(one: Problem, fit: Fit) -> Tensor:
    rows, columns = one.matrix.shape
    return one.fmt.decode(one.fmt.pack(fit.codes, fit.table, fit.scale), rows, columns, torch.float32)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.to_spec())
def test_what_is_stored_is_what_is_fitted(fmt: Lut) -> None:
    one, grams = problem(fmt)
    fit = fit_tables(one)
    assert torch.equal(decoded(one, fit), fit.values.gather(1, fit.codes.long()))
    better = refine_tables(one, fit, grams, rounds=3, cycles=4)
    assert torch.equal(decoded(one, better), better.values.gather(1, better.codes.long()))
    delta = (decoded(one, better) - one.matrix).double()
    want = sum(float(((d @ g.double()) * d).sum()) for d, g in zip(delta.split(6), grams, strict=True))
    assert better.error(one, grams) == pytest.approx(want, rel=1e-4)
    assert want < 0.8 * fit.error(one, grams)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.to_spec())
def test_zeros_of_a_pruned_weight_stay_zero(fmt: Lut) -> None:
    one, grams = problem(fmt, pruned=0.4)
    for fit in (fit_tables(one), refine_tables(one, fit_tables(one), grams, rounds=2, cycles=3)):
        assert bool((decoded(one, fit)[one.pruned] == 0).all())
        assert float((decoded(one, fit) - one.matrix).norm() / one.matrix.norm()) < 0.4


def test_kept_weights_cost_nothing_and_widen_no_table() -> None:
    one, grams = problem(Lut(entries=8), kept=0.05)
    one.matrix[one.kept] *= 100
    fit = refine_tables(one, fit_tables(one), grams, rounds=2, cycles=3)
    assert float(fit.values.abs().max()) <= 1.3 * float(one.matrix.masked_fill(one.kept, 0.0).abs().max())
    far = Fit(codes=torch.where(one.kept, 7 - fit.codes, fit.codes), table=fit.table, scale=fit.scale, values=fit.values)
    assert far.error(one, grams) == pytest.approx(fit.error(one, grams))


def test_rows_without_weight_are_clustered_all_the_same() -> None:
    one, _ = problem(Lut(entries=8))
    assert one.weights is not None
    one.weights[3] = 0.0
    assert float((decoded(one, fit_tables(one))[3] - one.matrix[3]).norm() / one.matrix[3].norm()) < 0.3


def test_more_rounds_never_hurt() -> None:
    one, grams = problem(Lut(entries=4))
    start = fit_tables(one)
    errors = [start.error(one, grams), *(refine_tables(one, start, grams, rounds=r, cycles=4).error(one, grams) for r in (1, 2, 4))]
    assert errors == sorted(errors, reverse=True)
