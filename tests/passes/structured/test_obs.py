"""Elimination against brute-force least squares."""

from __future__ import annotations

import pytest
import torch

from fxpress.passes.structured.obs import damped, eliminate

from .nets import redundant


def _problem(blocks: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = blocks * width
    x = torch.randn(200, columns, generator=generator, dtype=torch.float64) @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(5, columns, generator=generator, dtype=torch.float64), x.t() @ x / 200, torch.arange(blocks).repeat(width)


def _best_error(weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor) -> float:
    new = torch.zeros_like(weight)
    new[:, keep] = torch.linalg.solve(hessian[keep][:, keep], hessian[keep] @ weight.t()).t()
    lost = weight - new
    return float((lost @ hessian * lost).sum())


@pytest.mark.parametrize(("blocks", "width"), [(8, 1), (5, 3)])
def test_elimination_is_greedy_and_exact(blocks: int, width: int) -> None:
    weight, gram, owner = _problem(blocks, width)
    hessian = damped(gram)
    scores = eliminate(weight, gram, owner, blocks)
    left, total, floor = set(range(blocks)), 0.0, 0.0
    for _ in range(blocks - 1):
        rises = {j: _best_error(weight, hessian, _columns(owner, left - {j})) - total for j in left}
        first = min(rises, key=lambda j: rises[j])
        floor = max(floor, rises[first])
        assert float(scores[first]) == pytest.approx(floor, rel=1e-6)
        left.remove(first)
        total += rises[first]
    assert float(scores[left.pop()]) == float(scores.max())


def _columns(owner: torch.Tensor, left: set[int]) -> torch.Tensor:
    return torch.isin(owner, torch.tensor(sorted(left))).nonzero().flatten()


def test_columns_of_other_classes_stay() -> None:
    weight, gram, owner = _problem(6, 1)
    owner = torch.tensor([0, 1, 2, -1, -1, -1])
    scores = eliminate(weight, gram, owner, 3)
    assert float(scores.min()) == pytest.approx(min(_best_error(weight, damped(gram), (owner != j).nonzero().flatten()) for j in range(3)), rel=1e-6)


def test_redundant_units_cost_next_to_nothing() -> None:
    program, ctx = redundant()
    rows = ctx.calibration[0][0][0].double()
    up, down = (s.matrix().double() for s in program.sites())
    hidden = (rows @ up.t() + dict(program.graph_module.named_parameters())["up.bias"].detach().double()) * 2
    score = eliminate(down, hidden.t() @ hidden / len(rows), torch.arange(8), 8, damping=1e-8).sort().values
    assert float(score[3]) < 1e-4 * float(score[4])
