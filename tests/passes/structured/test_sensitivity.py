"""Output sensitivities against gradients taken by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxpress.passes.examples import Labelled, as_examples
from fxpress.passes.structured.sensitivity import output_sensitivity

from .nets import mlp, tiny_with_data


def test_mean_squared_output_gradients() -> None:
    program, ctx = mlp()
    rows, target = ctx.calibration[0][0][0], torch.arange(64) % 6
    ctx = replace(ctx, training=as_examples([Labelled((rows,), target)], program.inputs))
    sites = [s for s in program.sites() if s.name == "down"]
    got = output_sensitivity(program, sites, ctx)["down"]
    logits = program.run(rows)
    slope = (torch.softmax(logits, -1) - torch.nn.functional.one_hot(target, 6)) / 64
    torch.testing.assert_close(got, slope.square().mean(0), rtol=1e-4, atol=1e-9)


def test_convolutions_count_every_pixel() -> None:
    program, ctx = tiny_with_data("conv")
    sites = [s for s in program.sites() if s.name in ("conv1", "conv2")]
    assert {n: tuple(s.shape) for n, s in output_sensitivity(program, sites, ctx).items()} == {"conv1": (8,), "conv2": (8,)}
