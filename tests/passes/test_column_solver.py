"""The Cholesky factor against an explicit inverse, columns no data reached, sharing, and slices that cover every row once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.ir.errors import PassError
from fxpress.passes import column_solver
from fxpress.passes.calibrate import Statistics
from fxpress.passes.column_solver import factor, row_slices, shared_solver

from .nets import conv_net


def gram(columns: int = 12, dead: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(50, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, dead] = 0.0
    return x.T @ x / 50


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_inverse_in_visiting_order(act_order: bool) -> None:
    g = gram()
    solver = factor(g, damping=0.01, act_order=act_order, where="test")
    h = g.double() + 0.01 * g.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    inverse = torch.linalg.inv(h[solver.order][:, solver.order])
    upper = solver.upper.double()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-4, atol=1e-6)
    assert torch.equal(solver.order, g.diagonal().argsort(descending=True) if act_order else torch.arange(12))


def test_columns_no_data_reached_move_nothing_else() -> None:
    g = gram(dead=(3, 7))
    before = g.clone()
    upper = factor(g, damping=0.01, act_order=False, where="test").upper
    off = upper - upper.diagonal().diag()
    assert not off[[3, 7]].any() and not off[:, [3, 7]].any()
    assert torch.equal(g, before)


def test_a_gram_that_cannot_be_factored_says_where() -> None:
    with pytest.raises(PassError, match=r"some_pass at layer: the input Gram cannot be factored"):
        factor(-gram() * 1e9, damping=1e-9, act_order=False, where="some_pass at layer")


def test_one_factorization_serves_all_sites_with_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = factor

    def counted(gram: Tensor, *, damping: float, act_order: bool, where: str) -> column_solver.ColumnSolver:
        calls.append(where)
        return real(gram, damping=damping, act_order=act_order, where=where)

    monkeypatch.setattr(column_solver, "factor", counted)
    statistics = Statistics(tokens=50, gram=torch.stack([gram(), gram(12, (1,))]))
    solvers = [shared_solver(statistics, g, damping=0.01, act_order=False, where=w) for g, w in ((0, "q"), (0, "k"), (1, "v"))]
    assert calls == ["q", "v"]
    assert solvers[0] is solvers[1]


def test_slices_cover_every_row_once_and_stay_inside_their_conv_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_solver, "SLICE_ELEMENTS", 3 * 256)
    for site in conv_net()[0].sites():
        rows = [(group, i) for group, part in row_slices(site) for i in range(part.start, part.stop)]
        assert [i for _, i in rows] == list(range(site.rows))
        assert all(group == i // (site.rows // site.groups) for group, i in rows)
    assert max(part.stop - part.start for _, part in row_slices(conv_net()[0].sites()[2])) == 3
