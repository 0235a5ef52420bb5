"""LNQ: tables solve the normal equations, coordinate descent never raises the error and ends where no single code helps, frozen weights stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.passes.lut.lnq import Rows, solve_tables

from ...tiny import randn, seeded


def setting(rows: int = 6, columns: int = 40, entries: int = 4) -> tuple[Rows, Tensor, Tensor]:
    x = randn(200, columns) @ randn(columns, columns, seed=1)
    matrix = randn(rows, columns, seed=2)
    values = matrix.quantile(torch.linspace(0.1, 0.9, entries), dim=1).t().contiguous()
    codes = (matrix.unsqueeze(-1) - values.unsqueeze(1)).abs().argmin(-1).to(torch.uint8)
    return Rows(matrix=matrix, gram=x.t() @ x / len(x), frozen=torch.rand(rows, columns, generator=seeded(3)) < 0.1), codes, values


def by_definition(rows: Rows, codes: Tensor, values: Tensor) -> Tensor:
    delta = (values.double().gather(1, codes.long()) - rows.matrix.double()).masked_fill(rows.frozen, 0.0)
    return torch.einsum("nk,kj,nj->n", delta, rows.gram.double(), delta)


def test_error_is_the_quadratic_form() -> None:
    rows, codes, values = setting()
    torch.testing.assert_close(rows.error(codes, values), by_definition(rows, codes, values), rtol=1e-5, atol=0)


def test_descent_lowers_the_error_and_ends_where_no_code_helps() -> None:
    rows, codes, values = setting()
    errors = [by_definition(rows, codes, values)]
    for _ in range(6):
        codes = rows.descend(codes, values, 1)
        errors.append(by_definition(rows, codes, values))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-6)).all())
    assert bool((errors[-1] < 0.9 * errors[0]).all())
    codes = rows.descend(codes, values, 100)
    best = by_definition(rows, codes, values)
    for n, k in ((0, 0), (3, 17), (5, 39)):
        for code in range(values.shape[1]):
            changed = codes.clone()
            changed[n, k] = code
            assert by_definition(rows, changed, values)[n] >= best[n] * (1 - 1e-5)


def test_frozen_weights_keep_their_codes_and_do_not_count() -> None:
    rows, codes, values = setting()
    assert torch.equal(rows.descend(codes, values, 5)[rows.frozen], codes[rows.frozen])
    elsewhere = torch.where(rows.frozen, (codes + 1) % 4, codes)
    torch.testing.assert_close(rows.error(elsewhere, values), rows.error(codes, values))


def test_tables_solve_the_least_squares_problem() -> None:
    rows, codes, values = setting()
    left, right = rows.normal_equations(codes, 4)
    free = (~rows.frozen).double()
    hot = torch.nn.functional.one_hot(codes.long(), 4).double() * free.unsqueeze(-1)
    torch.testing.assert_close(left, torch.einsum("nke,kj,njf->nef", hot, rows.gram.double(), hot), rtol=1e-4, atol=1e-4)
    tables = solve_tables(left, right, values, torch.zeros_like(values, dtype=torch.bool))
    root = torch.linalg.cholesky(rows.gram.double())
    for n in range(len(codes)):
        want = torch.linalg.lstsq(root.t() @ hot[n], root.t() @ (rows.matrix[n].double() * free[n]).unsqueeze(1)).solution.flatten()
        torch.testing.assert_close(tables[n].double(), want, rtol=1e-3, atol=1e-4)


def test_pinned_and_unused_entries_stay() -> None:
    rows, codes, values = setting()
    values[:, 1] = 0.0
    codes = torch.where(codes == 3, 2, codes)
    pinned = torch.zeros_like(values, dtype=torch.bool)
    pinned[:, 1] = True
    tables = solve_tables(*rows.normal_equations(codes, 4), values, pinned)
    assert bool((tables[:, 1] == 0).all()) and torch.equal(tables[:, 3], values[:, 3])
    assert bool((by_definition(rows, codes, tables) <= by_definition(rows, codes, values) * (1 + 1e-6)).all())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    rows, codes, values = setting(rows=33)
    other = Rows(matrix=rows.matrix, gram=rows.gram, frozen=rows.frozen, threads=threads)
    assert torch.equal(other.descend(codes, values, 3), rows.descend(codes, values, 3))


def test_inputs_that_are_always_zero_change_no_code() -> None:
    rows, codes, values = setting()
    gram = rows.gram.clone()
    gram[5], gram[:, 5] = 0.0, 0.0
    out = Rows(matrix=rows.matrix, gram=gram, frozen=rows.frozen).descend(codes, values, 3)
    assert torch.equal(out[:, 5], codes[:, 5])
