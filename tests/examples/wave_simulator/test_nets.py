"""Data and nets of the wave simulator: what the tasks hold, rollouts of an exact step, and both nets made one-way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fxpress

pytest.importorskip("skfem")

from fxpress.examples.wave_simulator.data import batches, grid, simulate
from fxpress.examples.wave_simulator.nets import StepNet, UNet, relative_error, rollout, rollout_error


def test_trajectories_are_split_whole_and_the_tasks_are_cut_from_them() -> None:
    waves = simulate(5, nodes=9, frames=6)
    training, test = waves.split(3, 2)
    assert torch.equal(torch.cat([training.u, test.u]), waves.u) and waves.u.square().mean().item() == pytest.approx(1, rel=1e-4)
    before, after = training.steps()
    assert before.shape == (12, 2, 9, 9) and torch.equal(before[5], waves.u[1, 1:3]) and torch.equal(after[5, 0], waves.u[1, 3])
    first, later = test.fields(4)
    assert torch.equal(first[:, 0], test.u[:, 0]) and torch.equal(later[:, 0], test.u[:, 4])
    assert torch.equal(simulate(5, nodes=9, frames=6).u, waves.u) and not torch.equal(simulate(5, nodes=9, frames=6, seed=1).u, waves.u)


def test_layered_media_are_a_channel() -> None:
    waves = simulate(2, nodes=9, frames=5, layered=True)
    before, _ = waves.steps()
    assert before.shape == (6, 3, 9, 9) and before[:, 2, 0].eq(1).all() and (before[:, 2, -1] < 0.9).all()
    assert waves.fields(2)[0].shape == (2, 2, 9, 9)


def test_an_exact_step_rolls_out_without_error() -> None:
    """A mode obeys u'' = -w^2 u, so frames T apart are u(t + T) = 2 cos(w T) u(t) - u(t - T)."""
    x, y = grid(9)
    mode = torch.from_numpy(np.sin(np.pi * x) * np.sin(np.pi * y)).double()
    times = torch.arange(27).double() * 0.3
    u = torch.cos(times)[None, :, None, None] * mode

    def step(fields: Tensor) -> Tensor:
        return 2 * np.cos(0.3) * fields[:, 1:2] - fields[:, :1]

    assert rollout_error(step, u[:, :2], u[:, 2:]) < 1e-12
    assert relative_error(step, (u[0].unfold(0, 3, 1).permute(0, 3, 1, 2)[:, :2], u[0, 2:, None])) < 1e-12
    assert rollout(step, torch.cat([u[:, :2], u[:, :1]], 1), 3).shape == (1, 3, 9, 9), "what else is known is carried along"


def test_batches_go_through_the_data_in_random_order() -> None:
    data = torch.arange(6.0).view(6, 1), torch.arange(6.0).view(6, 1)
    made = batches(data, size=2, count=6)
    seen = torch.cat([b.target for b in made]).flatten()
    assert len(made) == 6 and seen[:6].sort().values.tolist() == seen[6:].sort().values.tolist() == list(range(6))
    assert all(torch.equal(b.inputs[0], b.target) for b in made)


def test_noise_is_added_to_inner_fields_only() -> None:
    data = simulate(1, nodes=9, frames=40, layered=True).steps()
    plain, noisy = (batches(data, size=38, count=1, noise=n)[0] for n in (0.0, 0.1))
    added = noisy.inputs[0] - plain.inputs[0]
    assert torch.equal(noisy.target, plain.target) and not added[:, 2].any() and not added[..., 0].any() and not added[..., -1, :].any()
    assert 0.09 < added[:, :2, 1:-1, 1:-1].std().item() < 0.11


@pytest.mark.parametrize(("net", "channels", "converted"), [(StepNet(width=8), 2, 4), (UNet(widths=(8, 12, 16)), 1, 8)])
def test_both_nets_become_one_way(net: torch.nn.Module, channels: int, converted: int) -> None:
    x = torch.randn(2, channels, 17, 17, generator=torch.Generator().manual_seed(0))
    result = fxpress.optimize(net.eval(), "oneway_conv{start=fresh}", example_inputs=(x,))
    assert len([t for t in result.reports[0].taken if t.bytes_before > 4 * 9 * 8 * 8 - 1]) == converted
    found = result.program.run(x)
    assert found.shape == (2, 1, 17, 17) and not found[..., 0, :].any() and not found[..., -1].any()


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(tmp_path: Path) -> None:
    from fxpress.examples.wave_simulator.demo import run_wave

    pytest.importorskip("onnxruntime")
    pytest.importorskip("matplotlib")
    run_wave(tmp_path, quick=True)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"dense.onnx", "one-way.onnx", "one-way-8-bits.onnx", "curves.png", "rollout.png", "report.md"}
    report = (tmp_path / "report.md").read_text()
    assert "| parameters | 37,889 | 5,319 | 5,319 |" in report and "10 steps, error on new waves" in report
