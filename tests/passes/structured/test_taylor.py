"""Taylor importance against the change of the loss when an index really vanishes a little."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxpress.passes.examples import Labelled, as_examples
from fxpress.passes.structured.taylor import taylor_scores

from .nets import groups_of, mlp, tiny_with_data


def test_first_order_change_of_the_loss() -> None:
    program, ctx = mlp()
    rows, target = ctx.calibration[0][0][0], torch.arange(64) % 6
    ctx = replace(ctx, training=as_examples([Labelled((rows,), target)], program.inputs))
    (group,) = groups_of(program)
    score = taylor_scores(program, [group], ctx)[group]
    weight = next(s for s in program.sites() if s.name == "down").matrix()
    up = torch.relu(rows @ dict(program.graph_module.named_parameters())["up.weight"].t() + dict(program.graph_module.named_parameters())["up.bias"])

    def loss(scale: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((up * scale) @ weight.t(), target)

    slope = torch.autograd.functional.jacobian(loss, torch.ones(20))
    torch.testing.assert_close(score, slope.abs(), rtol=1e-4, atol=1e-6)


def test_without_labels_the_outputs_count() -> None:
    program, ctx = mlp()
    first, second = (taylor_scores(program, groups_of(program), ctx) for _ in range(2))
    assert [s.tolist() for s in first.values()] == [s.tolist() for s in second.values()]
    assert all(float(s.max()) > 0 for s in first.values())


def test_language_models_use_their_next_tokens() -> None:
    program, ctx = tiny_with_data("llama")
    groups = groups_of(program)
    scores = taylor_scores(program, groups, ctx)
    assert all(float(scores[g].min()) >= 0 and float(scores[g].max()) > 0 for g in groups)
