"""Importances against their formulas in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.passes.structured.scores import Importance, comparable, observable, score_groups

from .nets import groups_of, hidden_inputs, mlp, tiny_with_data


def _expected(importance: Importance, up: Tensor, bias: Tensor, down: Tensor, x: Tensor) -> Tensor:
    if importance is Importance.L1:
        return up.abs().sum(1) + bias.abs() + down.abs().sum(0)
    if importance is Importance.L2:
        return (up.square().sum(1) + bias.square() + down.square().sum(0)).sqrt()
    if importance is Importance.WANDA:
        return x.norm(dim=0) * down.abs().sum(0)
    return x.var(0, unbiased=False) * down.square().sum(0)


@pytest.mark.parametrize("importance", [Importance.L1, Importance.L2, Importance.WANDA, Importance.FLAP])
def test_formula(importance: Importance) -> None:
    program, ctx = mlp()
    groups = groups_of(program)
    up, down = (next(s for s in program.sites() if s.name == n).matrix().double() for n in ("up", "down"))
    bias = dict(program.graph_module.named_parameters())["up.bias"].double()
    wanted = _expected(importance, up, bias, down, hidden_inputs(program, ctx))
    got = score_groups(program, groups, importance, ctx)[groups[0]]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("importance", list(Importance))
@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_every_group_has_a_finite_score(name: str, importance: Importance) -> None:
    program, ctx = tiny_with_data(name)
    groups = groups_of(program)
    scores = comparable(score_groups(program, groups, importance, ctx), importance)
    assert list(scores) == groups or set(scores) == set(groups)
    for group, score in scores.items():
        assert score.shape == (group.size,)
        assert torch.isfinite(score).all()
        assert (score >= 0).all()
        assert score.max() > 0


def test_shares_sum_to_one_and_losses_stay() -> None:
    scores = {group: torch.tensor([1.0, 3.0]) for group in groups_of(mlp()[0])}
    assert [s.tolist() for s in comparable(scores, Importance.WANDA).values()] == [[0.25, 0.75]]
    assert comparable(scores, Importance.OBS) is scores


def test_a_group_without_observable_consumers_is_scored_by_its_weights() -> None:
    program, ctx = mlp()
    (group,) = groups_of(program)
    assert observable(group)
    blind = type(group)(group.axis, group.role, group.analysis, (), group.parameters, group.macs)
    scores = score_groups(program, [blind], Importance.WANDA, ctx)
    torch.testing.assert_close(scores[blind], score_groups(program, [group], Importance.L2, ctx)[group])
