"""The checkpoint of a training run: everything comes back, and a damaged or foreign file means a fresh start."""

from __future__ import annotations

from pathlib import Path

import torch

from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.training_state import Standing, load_state, save_state

from ..checks import assert_same
from ..tiny import randn


def trained() -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    weights = {name: randn(3, 2, seed=i).requires_grad_() for i, name in enumerate("ab")}
    return weights, torch.optim.AdamW(list(weights.values()), lr=0.1)


def step(weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    weights["a"].square().sum().backward()
    optimizer.step()


def test_round_trip_goes_on_bit_equal(tmp_path: Path) -> None:
    ctx = Context(checkpoint=Checkpoint(tmp_path, "mark"), stage=3)
    weights, optimizer = trained()
    step(weights, optimizer)
    standing = Standing(step=1, start=2.0, history=[(0, 2.0)])
    assert standing.take(1 / 3)
    save_state(ctx, "x", standing, weights, {"a": weights["a"].detach().clone()}, optimizer)
    assert (tmp_path / "stage-03-x.safetensors").exists()
    random = torch.rand(1)
    again, fresh = trained()
    best: dict[str, torch.Tensor] = {}
    assert load_state(ctx, "x", again, best, fresh) == standing
    assert torch.equal(torch.rand(1), random)
    assert_same(best, {"a": weights["a"].detach()})
    step(weights, optimizer)
    step(again, fresh)
    assert_same([w.detach() for w in again.values()], [w.detach() for w in weights.values()])


def test_no_folder_damaged_file_and_other_weights(tmp_path: Path) -> None:
    weights, optimizer = trained()
    save_state(Context(), "x", Standing(), weights, {}, optimizer)
    assert load_state(Context(), "x", weights, {}, optimizer) is None
    ctx = Context(checkpoint=Checkpoint(tmp_path, "mark"))
    save_state(ctx, "x", Standing(), weights, {}, optimizer)
    assert load_state(ctx, "x", {"a": weights["a"]}, {}, optimizer) is None
    assert load_state(ctx, "y", weights, {}, optimizer) is None
    (tmp_path / "stage-00-x.safetensors").write_bytes(b"half a file")
    assert load_state(ctx, "x", weights, {}, optimizer) is None


def test_standing_counts_evaluations_without_a_better_one() -> None:
    standing = Standing()
    assert [standing.take(x) for x in (3.0, 2.0, 2.0, float("nan"), 1.0)] == [True, True, False, False, True]
    assert standing.best == 1.0 and standing.stale == 0 and len(standing.history) == 5
