"""Orders of units: the elimination against brute force, every score against its formula, and what they have in common."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fxpress.ir.errors import CalibrationError
from fxpress.ir.nodes import get_tensor
from fxpress.passes.context import Context
from fxpress.passes.modular import ridge_leverage
from fxpress.passes.nesting.orders import NestImportance, elimination, unit_orders

from ...tiny import randn
from ..structured.nets import groups_of, mlp, tiny_with_data


def hidden(program: object, ctx: Context) -> Tensor:
    """What the second linear of `mlp` sees, `[T, 20] f64`."""
    module = program.graph_module  # type: ignore[attr-defined]
    x = torch.cat([c[0][0] for c in ctx.calibration]).flatten(0, -2).double()
    return torch.relu(x @ get_tensor(module, "up.weight").detach().double().t() + get_tensor(module, "up.bias").detach().double())


def test_elimination_takes_the_least_each_time() -> None:
    factor = randn(9, 6, seed=1).double()
    interactions = factor @ factor.t()
    gone: list[int] = []
    for unit in elimination(interactions).tolist():
        left = [j for j in range(9) if j not in gone]
        errors = {j: float(interactions[[*gone, j]][:, [*gone, j]].sum()) for j in left}
        assert errors[unit] == pytest.approx(min(errors.values()), abs=1e-9)
        gone.append(unit)
    assert sorted(gone) == list(range(9))


def test_units_that_cancel_go_together() -> None:
    h = torch.tensor([[1.0, -1.0, 0.1], [2.0, -2.0, -0.1]])
    assert set(elimination(h.t() @ h).tolist()[:2]) != {0, 1}  # the small one first,
    assert min(combinations(range(3), 2), key=lambda p: float((h.t() @ h)[list(p)][:, list(p)].sum())) == (0, 1)  # though two that cancel cost nothing


@pytest.mark.parametrize("importance", list(NestImportance))
def test_every_score_orders_by_its_formula(importance: NestImportance) -> None:
    program, ctx = mlp()
    groups = groups_of(program)
    orders, means = unit_orders(program, groups, importance, ctx, centred=True)
    order, h = orders[groups[0]], hidden(program, ctx)
    assert sorted(order.tolist()) == list(range(20))
    torch.testing.assert_close(means["down"].double(), h.mean(0), rtol=1e-4, atol=1e-5)
    weight = get_tensor(program.graph_module, "down.weight").detach().double()
    scores = {
        NestImportance.ACTIVATION: h.abs().mean(0),
        NestImportance.WANDA: h.square().mean(0).sqrt() * weight.norm(dim=0),
        NestImportance.FLUCTUATION: h.var(0, unbiased=False) * weight.square().sum(0),
        NestImportance.LEVERAGE: ridge_leverage(h.t() @ h / len(h)),
    }
    if importance in scores:
        assert order.tolist() == scores[importance].argsort(descending=True).tolist()
    if importance is NestImportance.ELIMINATION:
        centred = h - h.mean(0)
        assert order.flip(0).tolist() == elimination((centred.t() @ centred / len(h)) * (weight.t() @ weight)).tolist()


def test_heads_are_ordered_as_wholes() -> None:
    program, ctx = tiny_with_data("llama")
    groups = groups_of(program)
    orders, _ = unit_orders(program, groups, NestImportance.ELIMINATION, ctx, centred=False)
    assert {len(orders[g]) for g in groups} == {2, 88} and all(sorted(orders[g].tolist()) == list(range(g.size)) for g in groups)


def test_without_data_there_is_no_order() -> None:
    program, _ = mlp()
    with pytest.raises(CalibrationError, match="needs calibration data"):
        unit_orders(program, groups_of(program), NestImportance.WANDA, Context(), centred=True)
