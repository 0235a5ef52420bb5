"""Anchored refits against least squares on the dense stream, and where they must not do anything."""

from __future__ import annotations

import torch
from torch import Tensor

from fxpress.ir.edit import Editor
from fxpress.ir.program import Program
from fxpress.ir.structure import Role, find_structure
from fxpress.passes.context import Call, Context
from fxpress.passes.structured.anchor import Aim, choose_ridge, compensate_anchored, refit
from fxpress.passes.structured.compensate import Compensation, compensate
from fxpress.passes.structured.groups import Group, find_groups
from fxpress.passes.tapped import Tapped, hidden_nodes

from ... import attention_models
from ...tiny import randn, seeded

CALLS: list[Call] = [((randn(2, 5, 6, seed=i).double(),), {}) for i in range(60)]


def groups(program: Program) -> list[Group]:
    return find_groups(program, find_structure(program), [Role.FFN])


def matrices(program: Program) -> list[Tensor]:
    return [s.matrix().clone() for s in program.sites()]


def test_without_anything_removed_nothing_moves() -> None:
    program = attention_models.program("one_key_head")
    before = matrices(program)
    with Editor(program, "test") as editor:
        errors = compensate_anchored(editor, {g: torch.arange(g.size) for g in groups(program)}, Context(calibration=CALLS))
    assert max(errors.values()) < 1e-2  # float32 sums
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(before, matrices(program), strict=True))


def stream_errors(program: Program, dense: Program) -> list[float]:
    """Relative error of every residual stream on the calibration data."""
    taps = hidden_nodes(program, dense)
    pairs = [(Tapped(program, taps)(c).hidden, Tapped(dense, taps)(c).hidden) for c in CALLS]
    return [float(sum((a[i] - b[i]).square().sum() for a, b in pairs) / sum(b[i].square().sum() for _, b in pairs)) ** 0.5 for i in range(len(taps))]


def test_later_layers_make_good_what_earlier_ones_lost() -> None:
    """The first network loses half its neurons; the second, which loses none, is refitted too and brings the stream nearer to the dense one."""
    dense = attention_models.program("one_key_head")
    results = {}
    for name in ("plain", "anchored"):
        program = dense.clone()
        found = groups(program)
        kept = {found[0]: torch.arange(12)}
        with Editor(program, "test") as editor:
            if name == "plain":
                compensate(editor, kept, Compensation.WEIGHTS, Context(calibration=CALLS))
            else:
                compensate_anchored(editor, {g: kept.get(g, torch.arange(g.size)) for g in found}, Context(calibration=CALLS))
        results[name] = stream_errors(program, dense)
    assert results["anchored"][-1] < 0.97 * results["plain"][-1]
    assert results["anchored"][1] < 1.01 * results["plain"][1]  # where the stream that arrives is still dense, both aim at the same


def test_the_refit_is_least_squares_and_the_ridge_pulls_to_the_weight() -> None:
    h, noise = randn(400, 12).double(), randn(400, 5, seed=1).double()
    weight, stays = randn(5, 12, seed=2).double(), torch.arange(12) < 8
    t = h @ weight.t() + 0.1 * noise
    aim = Aim(h.mean(0), t.mean(0), h.t() @ h / 400 - torch.outer(h.mean(0), h.mean(0)), t.t() @ h / 400 - torch.outer(t.mean(0), h.mean(0)), 1.0)
    new = refit(weight, aim, stays, 0.0)
    exact = torch.linalg.lstsq((h - h.mean(0))[:, :8], t - t.mean(0)).solution.t()
    assert torch.allclose(new[:, :8], exact, atol=1e-8)
    assert not bool(new[:, 8:].any())
    assert torch.equal(refit(weight, aim, stays, float("inf")), weight * stays)
    near, far = (float((refit(weight, aim, stays, r) - weight * stays).norm()) for r in (10.0, 0.01))
    assert near < far


def test_targets_that_are_noise_move_nothing() -> None:
    h = [torch.randn(40, 30, generator=seeded(i), dtype=torch.float64) for i in (0, 1)]
    weight = randn(4, 30, seed=3).double()
    folds = []
    for i, x in enumerate(h):
        t = x @ weight.t() + 3 * torch.randn(40, 4, generator=seeded(10 + i), dtype=torch.float64)
        folds.append(Aim(x.mean(0), t.mean(0), x.t() @ x / 40 - torch.outer(x.mean(0), x.mean(0)), t.t() @ x / 40 - torch.outer(t.mean(0), x.mean(0)), 1.0))
    assert choose_ridge(weight, folds, torch.ones(30, dtype=torch.bool)) >= 1.0
