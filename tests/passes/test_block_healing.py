"""Healing layer by layer: the held-out loss of every layer falls, what was not changed stays bit-equal, and what cannot be healed is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxpress.ir.capture import capture
from fxpress.ir.errors import PassError, TrainingError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors
from fxpress.passes import block_healing
from fxpress.passes.block_healing import find_cuts, heal_blocks, why_not_blocks
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.examples import Example, split
from fxpress.passes.losses import rows, stream_error
from fxpress.passes.tapped import Tapped
from fxpress.passes.trainable import Healing, find_parts, write_back
from fxpress.passes.training_options import TrainingOptions

from ..checks import assert_same
from ..tiny import Mlp, fresh_program, randn, tokens
from .healing_nets import compressed, context, tower

FAST = TrainingOptions(steps=30, lr=5e-3, evaluate_every=10, held_out=0.25)
MIDDLE = "factorize_svd{ratio=0.5,metric=weight,only=['layers.1.*']}"
ALL = "factorize_svd{ratio=0.5,metric=weight,only=['layers.*']}"


def heal(program: Program, ctx: Context, options: TrainingOptions = FAST) -> Healing:
    parts = find_parts(program)[0]
    reasons = why_not_blocks(program, parts, ctx.original)
    return heal_blocks(program, [p for p in parts if p.node not in reasons], ctx.training, options, ctx)


def healed(program: Program, found: Healing) -> Program:
    clone = program.clone()
    write_back(clone, [p for p in find_parts(clone)[0] if p.name in found.facts], found.tensors, "test", found.why, found.facts)
    return clone


def stream_errors(program: Program, original: Program, ctx: Context) -> list[float]:
    """Mean relative error of the stream behind every layer on the held-out batches, from whole runs in float64 sums."""
    ends = find_cuts(program, original).ends
    held = split(tuple(ctx.training), FAST.held_out, ctx.generator())[1]
    one, other = Tapped(program, ends), Tapped(original, ends)
    with torch.no_grad():
        pairs = [(one(e.call).hidden, other(e.call).hidden) for e in held]
    return [sum(float(stream_error(a[i].double(), b[i].double())) for a, b in pairs) / len(held) for i in range(len(ends))]


def test_every_layer_gets_better_and_the_reported_losses_are_those_of_whole_runs() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, ALL)
    before, found = {n: t.detach().clone() for n, t in named_tensors(student.graph_module)}, heal(student, ctx)
    assert_same({n: t.detach() for n, t in named_tensors(student.graph_module)}, before)  # found, not yet written
    after = stream_errors(healed(student, found), original, ctx)
    start = stream_errors(student, original, ctx)
    reported = [found.facts[f"layers.{i}.up.down"] for i in range(3)]
    assert [r["layer_loss_after"] for r in reported] == pytest.approx(after, rel=1e-4)
    assert reported[0]["layer_loss_before"] == pytest.approx(start[0], rel=1e-4)
    assert all(r["layer_loss_after"] < r["layer_loss_before"] for r in reported) and all(a < s for a, s in zip(after, start, strict=True))
    assert reported[1]["layer_loss_before"] != pytest.approx(start[1], rel=1e-3)  # it reads the healed first layer
    assert "3 of 3 layers got better (6 training and 2 held-out batches" in found.notes[0]


def test_only_layers_that_were_changed_are_trained() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, MIDDLE)
    done = healed(student, heal(student, ctx))
    moved = {n for n, t in named_tensors(done.graph_module) if not torch.equal(t, get_tensor(student.graph_module, n))}
    assert moved and all(n.startswith("layers.1.") for n in moved) and {"layers.1.norm.weight", "layers.1.up.down.weight"} <= moved
    reasons = {p.name: w for p in find_parts(student)[0] if (w := why_not_blocks(student, [p], original).get(p.node))}
    assert "no earlier pass changed its layer" in reasons["layers.2.up"] and "outside of the residual layers" in reasons["head"]


def test_a_dropped_layer_is_made_up_for_by_the_one_behind_it() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, "drop_blocks{count=1,skip=['layer 2']}")
    gone = next(i for i in range(2) if f"layers.{i}.up.weight" not in dict(named_tensors(student.graph_module)))
    found = heal(student, ctx)
    assert {n.split(".")[1] for n in found.tensors} == {str(gone + 1)}
    (losses,) = {tuple(f.values()) for f in found.facts.values()}
    assert losses[1] < losses[0]


def test_a_layer_that_does_not_get_better_keeps_its_weights() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, ALL)
    found = heal(student, ctx, replace(FAST, lr=30.0, clip=1e6, warmup=0.0))
    assert not found.tensors and all(f["layer_loss_before"] == f["layer_loss_after"] for f in found.facts.values())
    assert found.notes[0].startswith("0 of 3 layers got better")
    assert_same(healed(student, found).run_examples(), student.run_examples())


def test_tensors_read_in_two_layers_stay() -> None:
    original = tower(repeat=True)
    student = compressed(original, "prune_magnitude{sparsity=0.5}")
    reasons = why_not_blocks(student, find_parts(student)[0], original)
    named = {p.name: reasons.get(p.node) for p in find_parts(student)[0]}
    assert all("also read outside of its layer" in str(named[f"layers.0.{n}"]) for n in ("norm", "up", "down")) and named["layers.1.up"] is None
    assert {n.split(".")[1] for n in heal(student, context(original)).tensors} == {"1", "2"}


def test_masked_positions_do_not_count() -> None:
    original = fresh_program("llama")
    masks = [torch.ones(2, 8, dtype=torch.int64).index_fill(1, torch.arange(c, 8), 0) for c in (8, 5)]
    ends = find_cuts(original, original).ends
    assert len(ends) == 2
    examples = [Example(((), {"input_ids": tokens(2, 8, seed=i), "attention_mask": m})) for i, m in enumerate(masks)]
    student = compressed_llama(original, examples)
    ctx = Context(original=original, training=examples)
    found = heal(student, ctx, replace(FAST, steps=5, held_out=0.5))
    (held,) = split(tuple(examples), 0.5, ctx.generator())[1]
    keep = None if bool(held.call[1]["attention_mask"].all()) else held.call[1]["attention_mask"].bool()
    with torch.no_grad():
        mine, theirs = (Tapped(p, ends)(held.call).hidden[0] for p in (student, original))
    wanted = float(stream_error(rows(mine, keep), rows(theirs, keep)))
    assert found.facts["model.layers.0.mlp.up_proj"]["layer_loss_before"] == pytest.approx(wanted, rel=1e-4)


def compressed_llama(original: Program, examples: list[Example]) -> Program:
    from fxpress.passes.base import parse_pass
    from fxpress.passes.pipeline import run_pipeline

    return run_pipeline(original, [parse_pass("prune_magnitude{sparsity=0.6,skip=['*head']}")], Context(training=examples)).program


@pytest.mark.parametrize("calls", [3, 40, 70])
def test_a_killed_run_resumes_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    original = tower()
    student, options = compressed(original, ALL), replace(FAST, steps=20, checkpoint_every=7)
    left = [10**9]

    def counted(one: Tensor, other: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return stream_error(one, other)

    monkeypatch.setattr(block_healing, "stream_error", counted)
    want = heal(student, context(original, seed=3), options)
    ctx = context(original, seed=3, checkpoint=Checkpoint(tmp_path, "x"))
    left[0] = calls
    with pytest.raises(KeyboardInterrupt):
        heal(student, ctx, options)
    left[0] = 10**9
    got = heal(student, ctx, options)
    assert_same(dict(got.tensors), dict(want.tensors))
    assert (got.facts, got.notes) == (want.facts, want.notes)
    left[0] = 1
    assert_same(dict(heal(student, ctx, options).tensors), dict(want.tensors))  # not one further evaluation


def test_refusals() -> None:
    plain = capture(Mlp().eval(), (randn(4, 12),))
    with pytest.raises(PassError, match=r"it has none\. Use scope=model"):
        find_cuts(plain, plain)
    with pytest.raises(PassError, match=r"none of the same name and shape\. Use scope=model"):
        find_cuts(plain, tower())
    with pytest.raises(TrainingError, match="needs the original program"):
        heal_blocks(tower(), find_parts(tower())[0], context(tower()).training, FAST, Context())
