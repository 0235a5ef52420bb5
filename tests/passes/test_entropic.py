"""Entropic allocation against its own optimality, and the numbers of the specification's check."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import PassError
from fxpress.passes.entropic import entropic

INFLUENCE = torch.linspace(0.5, 0.05, 32, dtype=torch.float64)


@pytest.mark.parametrize("average", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("temperature", [0.02, 0.15, 1.0])
def test_the_mean_is_met_and_no_layer_exceeds_the_cap(average: float, temperature: float) -> None:
    shares = entropic(INFLUENCE, average, temperature, cap=0.8)
    assert float(shares.mean()) == pytest.approx(average, abs=1e-9)
    assert float(shares.max()) <= 0.8 + 1e-12
    assert bool((shares.diff() >= -1e-12).all())  # layers of less influence lose more


def test_it_maximises_influence_kept_plus_entropy() -> None:
    temperature, found = 0.2, entropic(INFLUENCE, 0.2, 0.2)

    def value(shares: torch.Tensor) -> float:
        return float((INFLUENCE * (1 - shares)).sum() - temperature * (shares * shares.clamp_min(1e-300).log()).sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = torch.randn(32, generator=generator, dtype=torch.float64) * 1e-3
        other = found + step - step.mean()
        assert value(other) <= value(found) + 1e-12


def test_a_small_temperature_fills_layers_to_the_cap_and_a_large_one_is_uniform() -> None:
    assert int((entropic(INFLUENCE, 0.3, 0.02) > 0.79).sum()) >= 4
    assert float(entropic(INFLUENCE, 0.3, 100.0).std()) < 1e-3


def test_more_than_the_cap_is_refused() -> None:
    with pytest.raises(PassError, match=r"cap=0\.8"):
        entropic(INFLUENCE, 0.9)
