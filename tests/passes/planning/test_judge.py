"""Costs and errors against float64 references, from Grams and from the data; chains as matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxpress.ir.nodes import argument
from fxpress.passes.base import Need
from fxpress.passes.calibrate import CalibrationWalk, Statistics, site_rows
from fxpress.passes.factorize_cp import FactorizeCp
from fxpress.passes.factorize_mpo import FactorizeMpo
from fxpress.passes.factorize_svd import FactorizeSvd
from fxpress.passes.factorize_tucker import FactorizeTucker
from fxpress.passes.planning.judge import Judge, matrix_of
from fxpress.passes.spectra import spectrum

from ...tiny import randn
from .nets import structured_convolutions, structured_linears


@pytest.mark.parametrize("weighted", [False, True])
def test_costs_are_weighted_output_errors(weighted: bool) -> None:
    program, ctx = structured_linears()
    site = program.sites()[0]
    statistics = CalibrationWalk(program, ctx.calibration).statistics([site], Need.GRAM)
    assert statistics.gram is not None
    sensitivity = randn(32).square() if weighted else None
    judge = Judge(site=site, tokens=statistics.tokens, gram=statistics.gram[0], sensitivity=sensitivity)
    found, rank = judge.spectrum(), 6
    down, up = found.factors(rank)
    rows = torch.cat([call[0][0] for call in ctx.calibration]).double()
    lost = rows @ (up.double() @ down.double() - site.matrix().double()).t()
    whole = rows @ site.matrix().double().t()
    weights = torch.ones(32) if sensitivity is None else sensitivity
    cost = float((lost.square() * weights).sum()) if weighted else float(lost.square().sum() / whole.square().sum())
    assert judge.approximation(up @ down)[0] == pytest.approx(cost, rel=1e-4)
    assert judge.approximation(up @ down)[1] == pytest.approx(float(lost.norm() / whole.norm()), rel=1e-4)
    assert judge.pair(found, rank)[0] == pytest.approx(cost, rel=1e-3)
    assert judge.pair(found, rank)[1] == pytest.approx(float(((lost.square() * weights).sum() / (whole.square() * weights).sum()) ** 0.5), rel=1e-3)


def test_without_a_gram_the_data_of_a_convolution_judge() -> None:
    program, ctx = structured_convolutions()
    site = program.sites()[1]
    statistics = CalibrationWalk(program, ctx.calibration).statistics([site], Need.GRAM | Need.INPUTS)
    assert statistics.gram is not None
    other = site.matrix() + 0.1 * randn(site.rows, site.columns)
    sensitivity = randn(site.rows).square()
    by_gram = Judge(site=site, tokens=statistics.tokens, gram=statistics.gram[0], sensitivity=sensitivity).approximation(other)
    by_data = Judge(site=site, tokens=statistics.tokens, gram=None, inputs=statistics.inputs, sensitivity=sensitivity).approximation(other)
    assert by_data == pytest.approx(by_gram, rel=1e-3)


@pytest.mark.parametrize("one", [FactorizeSvd(rank=5), FactorizeMpo(chi=4, family=2), FactorizeMpo(chi=3, family=4)])
def test_chains_of_linears_as_matrices(one: FactorizeSvd | FactorizeMpo) -> None:
    site = structured_linears()[0].sites()[0]
    chain, facts = one.chain(site, site.matrix(), Statistics(tokens=1, gram=torch.eye(32).unsqueeze(0)))
    assert not isinstance(chain, str)
    error = float((matrix_of(chain, site) - site.matrix()).norm() / site.matrix().norm())
    assert error == pytest.approx(facts["output_error"], abs=1e-3)


@pytest.mark.parametrize("one", [FactorizeSvd(rank=5, convolutions=True), FactorizeTucker(ratio=0.3), FactorizeCp(rank=6, starts=1, sweeps=20)])
def test_chains_of_convolutions_as_matrices(one: FactorizeSvd | FactorizeTucker | FactorizeCp) -> None:
    program, ctx = structured_convolutions()
    site = program.sites()[1]
    statistics = CalibrationWalk(program, ctx.calibration).statistics([site], Need.GRAM | Need.INPUTS)
    chain, _ = one.chain(site, site.matrix(), statistics)
    assert not isinstance(chain, str)
    x = next(iter(statistics.inputs))
    made = F.conv2d(x, matrix_of(chain, site).reshape(site.shape), padding=argument(site.node, "padding"))
    rows = torch.cat(list(site_rows(site, x)), 1)[0]
    assert torch.allclose(made.flatten(2).transpose(1, 2).flatten(0, 1), rows @ matrix_of(chain, site).t(), atol=1e-4)
    from fxpress.ir.chain import run

    assert torch.allclose(run(chain, x), made, atol=1e-4)


def test_a_decomposition_serves_all_ranks() -> None:
    matrix, gram = randn(8, 6), torch.eye(6)
    site = structured_linears()[0].sites()[0]
    judge = Judge(site=site, tokens=1, gram=gram)
    energy = spectrum(matrix, gram)
    assert [judge.pair(energy, r)[0] for r in range(7)] == sorted((judge.pair(energy, r)[0] for r in range(7)), reverse=True)
