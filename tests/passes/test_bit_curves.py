"""Cost curves: by their definition, falling with the width, the same for a resumed run."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import PassError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.formats.dense import Dense
from fxpress.ir.formats.lut import Lut
from fxpress.passes.base import parse_pass
from fxpress.passes.bit_curves import bit_curves, rounded
from fxpress.passes.quantizing import Quantization

from ..tiny import randn
from .nets import conv_net


@pytest.mark.parametrize("spec", ["quantize_lut", "quantize_gptq{group_size=8}", "quantize_rtn{symmetric=true}"])
def test_more_bits_cost_less(spec: str) -> None:
    program, ctx = conv_net()
    quantizer = parse_pass(spec)
    assert isinstance(quantizer, Quantization)
    sites = [s for s in program.sites() if s.name != "depthwise"]
    curves, diagonals = bit_curves(program, sites, quantizer, (2, 3, 4, 8), ctx)
    for site in sites:
        assert bool((curves[site.name].diff() < 0).all()), f"{site.name}: {curves[site.name]}"
        assert diagonals[site.name].shape == (1, site.columns)
    again, _ = bit_curves(program, sites, quantizer, (2, 3, 4, 8), ctx)
    assert all(again[n] is curves[n] for n in curves), "remembered within a run"


@pytest.mark.parametrize("fmt", [Lut(entries=8), Affine(bits=3, group_size=16)])
def test_rounding_minimises_weighted_errors(fmt: Lut | Affine) -> None:
    matrix, weights = randn(6, 64), randn(6, 64, seed=1).square() ** 2
    weighted, plain = rounded(matrix, fmt, weights), rounded(matrix, fmt, torch.ones_like(weights))
    error = [float((weights * (q - matrix).square()).sum()) for q in (weighted, plain)]
    assert error[0] < error[1]


def test_other_formats_are_refused() -> None:
    with pytest.raises(PassError, match="quantizer="):
        rounded(randn(2, 4), Dense(), torch.ones(2, 4))
