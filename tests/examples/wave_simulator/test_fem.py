"""Finite elements of the wave equation: energy, known solutions, and the stencils behind one-way filters."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("skfem")

from fxpress.examples.wave_simulator.data import Layers, grid, pulses
from fxpress.examples.wave_simulator.fem import WaveEquation


@pytest.mark.parametrize("speed", [None, Layers(0.4, 0.6)])
def test_energy_is_kept(speed: Layers | None) -> None:
    frames = WaveEquation(17, speed).run(pulses(3, 17, np.random.default_rng(0)), 400, every=10)
    assert frames.u.shape == (3, 41, 17, 17) and frames.drift < 1e-12
    assert not frames.u[:, :, [0, -1]].any() and not frames.u[:, :, :, [0, -1]].any()


def test_a_standing_wave_converges_with_the_square_of_the_mesh_width() -> None:
    def error(nodes: int) -> float:
        x, y = grid(nodes)
        mode, steps = np.sin(np.pi * x) * np.sin(2 * np.pi * y), nodes - 1
        found = WaveEquation(nodes).run(mode[None], steps, every=steps).u[0, -1]  # at t = 1/2
        return float(np.abs(found - mode * np.cos(np.sqrt(5) * np.pi / 2)).max())

    assert error(33) < 0.01 and 3.5 < error(17) / error(33) < 4.5


def test_waves_slow_down_in_the_second_layer() -> None:
    x, y = grid(33)
    bump = np.exp(-((x - 0.25) ** 2 + (y - 0.5) ** 2) / 0.005)[None]
    frames = [WaveEquation(33, speed).run(bump, 40).u[0, -1] for speed in (None, Layers(0.5, 0.5))]
    ahead = [np.abs(f[20:]).sum() for f in frames]
    assert ahead[1] < 0.8 * ahead[0]


def test_interior_stencils_have_the_ranks_that_one_way_filters_need() -> None:
    equation = WaveEquation(9)
    for matrix, rank in ((equation.mass, 1), (equation.stiffness, 2)):
        row = matrix[24].toarray().reshape(7, 7)[2:5, 2:5]  # of the middle node
        assert np.linalg.matrix_rank(row, tol=1e-12) == rank


def test_too_few_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 nodes"):
        WaveEquation(2)
