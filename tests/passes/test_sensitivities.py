"""Fisher information and guided Grams by their definitions, the batch they come in set aside, and remembered over runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import CalibrationError
from fxpress.ir.program import Program
from fxpress.ir.sites import SiteKind, WeightSite
from fxpress.passes import sensitivities
from fxpress.passes.base import Guidance, Need
from fxpress.passes.calibrate import CalibrationWalk, as_calls
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.gradients import Gradients
from fxpress.passes.sensitivities import Sensitivities, diagonal_fisher, fisher_blocks, guided_positions

from ..tiny import fresh_program, randn, tiny
from .nets import conv_net


def weighted(program: Program) -> list[WeightSite]:
    return [s for s in program.sites() if s.kind is not SiteKind.EMBEDDING]


def language(batch: int) -> tuple[Program, Context]:
    """The tiny llama with the same four sequences, `batch` at a time."""
    program = fresh_program("llama")
    ids = torch.randint(0, 90, (4, 7), generator=torch.Generator().manual_seed(0))
    fixed = {k: v for k, v in program.inputs.kwargs.items() if not isinstance(v, Tensor)}
    calls = [{"input_ids": part, "attention_mask": torch.ones_like(part)} | fixed for part in ids.split(batch)]
    names = [k for k, v in program.inputs.kwargs.items() if isinstance(v, Tensor)]
    return program, Context(calibration=as_calls([{k: c[k] for k in c if k in names or k in fixed} for c in calls], program.inputs))


def test_fisher_is_the_sum_of_squared_gradients_per_sequence() -> None:
    program, ctx = language(1)
    found = diagonal_fisher(program, weighted(program), ctx)
    model = tiny("llama").model
    total: dict[str, Tensor] = {}
    for _, kwargs in ctx.calibration:
        model.zero_grad()
        logits = model(**kwargs)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), kwargs["input_ids"][:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, torch.zeros(())) + parameter.grad.square()
    assert found
    for name, fisher in found.items():
        if name != "lm_head":
            torch.testing.assert_close(fisher, total[f"{name}.weight"], rtol=1e-3, atol=1e-7 * float(fisher.max()))


def test_batches_do_not_matter() -> None:
    (program, one), (_, two) = language(1), language(2)
    for take in (diagonal_fisher, guided_positions):
        a, b = take(program, weighted(program), one), take(program, weighted(program), two)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6 * float(a[name].max()))


def test_convolutions_and_groups() -> None:
    program, ctx = conv_net()
    fisher, positions = (f(program, weighted(program), ctx) for f in (diagonal_fisher, guided_positions))
    for site in weighted(program):
        assert fisher[site.name].shape == (site.rows, site.columns)
        assert positions[site.name].shape[0] == site.groups
        assert bool((fisher[site.name] >= 0).all()) and float(fisher[site.name].sum()) > 0
    assert positions["depthwise"].shape == (16, 8 * 8 * 16)


def test_guided_gram_is_the_gram_of_weighted_rows() -> None:
    program, ctx = conv_net()
    site = next(s for s in program.sites() if s.name == "hidden")
    walk, positions = CalibrationWalk(program, ctx.calibration), torch.rand(2, 64)
    x = torch.cat([_input_of(program, site, c) for c in ctx.calibration])
    walk.statistics([site], Need.NONE)
    want = torch.stack([(x * p.unsqueeze(1)).t() @ x / 64 for p in positions])
    torch.testing.assert_close(walk.guided(site, positions), want)
    with pytest.raises(CalibrationError, match="64 rows"):
        walk.guided(site, positions[:, :60])


def _input_of(program: Program, site: WeightSite, call: object) -> Tensor:
    found: list[Tensor] = []
    Gradients(program, [site], Context(calibration=(call,))).visit(lambda _, x, __: found.append(x), "test")  # type: ignore[arg-type]
    return found[0]


def test_a_site_that_does_not_reach_the_loss_gets_the_plain_gram() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.used(x), (self.idle(x) > 0).long()

    program = capture(Idle(), (randn(6, 4),))
    ctx = Context(calibration=as_calls([randn(6, 4)], program.inputs))
    sites = list(program.sites())
    walk, asked = CalibrationWalk(program, ctx.calibration), Need.GUIDED | Need.FISHER | Need.GRAM
    statistics = walk.statistics(sites, asked)
    Sensitivities(program, sites, asked, Guidance(power=0.5), ctx).complete(statistics, walk, sites)
    assert statistics.gram is not None
    torch.testing.assert_close(statistics.guided["idle"], statistics.gram)
    assert bool((statistics.fisher["idle"] == 1).all()) and not bool((statistics.fisher["used"] == 1).all())


def test_blocks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    program, ctx = conv_net()
    sites = weighted(program)
    whole = diagonal_fisher(program, sites, ctx)
    monkeypatch.setattr(sensitivities, "BLOCK_BYTES", 4 * 600)
    blocks = fisher_blocks(sites)
    assert [s.name for b in blocks for s in b] == [s.name for s in sites] and len(blocks) > 1
    assert all(len(b) == 1 or sum(4 * s.parameters for s in b) <= 4 * 600 for b in blocks)
    for block in blocks:
        for name, fisher in diagonal_fisher(program, block, ctx).items():
            torch.testing.assert_close(fisher, whole[name])


def test_a_second_run_reads_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, ctx = conv_net()
    folder = Checkpoint(tmp_path / "c", "mark")
    first = guided_positions(program, weighted(program), Context(calibration=ctx.calibration, checkpoint=folder))
    monkeypatch.setattr(Gradients, "visit", lambda *_: pytest.fail("gradients were taken again"))
    again = guided_positions(program, weighted(program), Context(calibration=ctx.calibration, checkpoint=folder))
    assert all(torch.equal(first[n], again[n]) for n in first)
