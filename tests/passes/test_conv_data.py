"""Grams of channels and positions, and last factors fitted to data, against what the patches themselves give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir.chain import Convolution
from fxpress.ir.site_calls import conv_geometry
from fxpress.ir.sites import WeightSite
from fxpress.passes import conv_data
from fxpress.passes.calibrate import site_rows
from fxpress.passes.conv_data import ConvData

from .nets import correlated

CONVOLUTIONS = [
    (nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), (9, 8)),
    (nn.Conv2d(5, 7, (4, 1), padding=(1, 0)), (12, 1)),
    (nn.Conv1d(5, 7, 4, stride=2, padding=3), (13,)),
]


def _site(conv: nn.Module, places: tuple[int, ...]) -> tuple[WeightSite, tuple[Tensor, ...]]:
    inputs = tuple(correlated(b, 5, *places) for b in (4, 3))
    return fxpress.capture(nn.Sequential(conv).eval(), (inputs[0],), dynamic_shapes=({0: torch.export.Dim("batch")},)).sites()[0], inputs


@pytest.mark.parametrize(("conv", "places"), CONVOLUTIONS)
def test_grams_are_those_of_the_patches(conv: nn.Module, places: tuple[int, ...]) -> None:
    site, inputs = _site(conv, places)
    rows = torch.cat([r[0] for x in inputs for r in site_rows(site, x)]).double().unflatten(1, (5, -1))  # [T, C, P]
    data = ConvData(site, inputs)
    assert torch.allclose(data.channels(), torch.einsum("tcp,tdp->cd", rows, rows) / (rows.shape[0] * rows.shape[2]), rtol=1e-4, atol=1e-5)
    assert torch.allclose(data.positions(), torch.einsum("tcp,tcq->pq", rows, rows) / (rows.shape[0] * rows.shape[1]), rtol=1e-4, atol=1e-5)


def test_images_are_left_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    site, _ = _site(nn.Conv1d(5, 7, 4), (13,))
    inputs = tuple(torch.full((b, 5, 13), float(i)) for i, b in enumerate((4, 1, 3)))
    marked = tuple(x + torch.arange(len(x)).view(-1, 1, 1) / 10 for x in inputs)
    found = ConvData(site, marked)._sample(10, 30)  # every third of eight
    assert torch.cat(found)[:, 0, 0].tolist() == pytest.approx([0.0, 0.3, 2.1])
    whole = ConvData(site, marked)
    monkeypatch.setattr(conv_data, "ROWS", 1)
    assert float(ConvData(site, (marked[0],)).channels()[0, 0]) == pytest.approx(0.0) and float(whole.positions()[0, 0]) > 0


def _random_chain(site: WeightSite, rank: int) -> tuple[Convolution, Convolution]:
    """The convolution's own geometry with random filters, and a random 1x1 factor."""
    generator, axes = torch.Generator().manual_seed(0), len(site.shape) - 2
    stride, padding, dilation = (tuple(v) for v in conv_geometry(site))
    first = Convolution(name="a", weight=torch.randn(rank, *site.shape[1:], generator=generator), stride=stride, padding=padding, dilation=dilation)
    ones = (1,) * axes
    last = torch.randn(site.rows, rank, *ones, generator=generator)
    return first, Convolution(name="b", weight=last, stride=ones, padding=(0,) * axes, dilation=ones)


@pytest.mark.parametrize(("conv", "places"), CONVOLUTIONS)
def test_the_last_factor_is_that_of_least_squares(conv: nn.Module, places: tuple[int, ...]) -> None:
    site, inputs = _site(conv, places)
    chain = _random_chain(site, 4)
    (_, last), error = ConvData(site, inputs).fitted(chain, site.matrix())
    rows = torch.cat([r[0] for x in inputs for r in site_rows(site, x)]).double()
    wanted, known = rows @ site.matrix().double().t(), rows @ chain[0].weight.double().flatten(1).t()
    best = torch.linalg.lstsq(known, wanted).solution
    least = float((known @ best - wanted).norm() / wanted.norm())
    assert isinstance(last, Convolution) and least - 1e-6 <= error < 1.1 * least
    assert float((known @ last.weight.double().flatten(1).t() - wanted).norm() / wanted.norm()) == pytest.approx(error, rel=1e-3)


def test_little_data_does_not_spoil_a_good_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer rows than inputs, least squares alone would fit the calibration data and nothing else."""
    torch.manual_seed(0)
    conv = nn.Conv1d(5, 7, 4)
    site, _ = _site(conv, (13,))
    chain = _random_chain(site, 20)
    exact = torch.linalg.lstsq(chain[0].weight.double().flatten(1).t(), site.matrix().double().t()).solution.t()
    near = Convolution(name="b", weight=(exact * 1.02).float().unsqueeze(-1), stride=(1,), padding=(0,), dilation=(1,))
    few, many = (torch.randn(b, 5, 5, generator=torch.Generator().manual_seed(b)) for b in (4, 200))
    (_, fitted), _ = ConvData(site, (few,)).fitted((chain[0], near), site.matrix())
    monkeypatch.setattr(conv_data, "WIDEST", 1)  # nothing is fitted any more: only the error is measured
    old, new = (ConvData(site, (many,)).fitted((chain[0], f), site.matrix())[1] for f in (near, fitted))
    assert old == pytest.approx(0.02, rel=0.05) and new < 1.2 * old
