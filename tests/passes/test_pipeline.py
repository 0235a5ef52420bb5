"""Order, planning on what earlier passes leave, guarantees, resume after a kill, and dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fxpress.ir.errors import CheckpointError, PassError, SpecError
from fxpress.ir.program import Program
from fxpress.ir.sites import WeightSite
from fxpress.passes.base import Guarantee, Need, matches, parse_pass
from fxpress.passes.calibrate import CalibrationWalk, Statistics
from fxpress.passes.checkpoint import Checkpoint, fingerprint
from fxpress.passes.context import Context
from fxpress.passes.estimate import dry_run
from fxpress.passes.pipeline import plan_passes, run_pipeline

from .nets import conv_net

RECIPE = ("fold_affine", "prune_wanda{sparsity=0.5}", "quantize_gptq{bits=4,group_size=8}")


def payloads(program: Program) -> list[torch.Tensor]:
    """All stored tensors of all sites."""
    return [t for site in program.sites() for t in site.payload().values()]


def with_checkpoint(folder: Path, recipe: tuple[str, ...] = RECIPE, seed: int = 0) -> tuple[Program, Context]:
    """The conv net with a context that resumes from `folder`."""
    program, ctx = conv_net()
    mark = fingerprint(program, recipe, ctx.calibration, seed)
    return program, Context(calibration=ctx.calibration, seed=seed, checkpoint=Checkpoint(folder, mark))


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_resumes_bit_equal_and_skips_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    passes = [parse_pass(s) for s in RECIPE]
    program, ctx = conv_net()
    want = payloads(run_pipeline(program, passes, ctx).program)
    program, ctx = with_checkpoint(tmp_path / "ckpt")
    saved = Checkpoint.save

    def save_then_die(self: Checkpoint, *args: object) -> None:
        saved(self, *args)  # type: ignore[arg-type]
        if len(list(self.folder.glob("*.safetensors"))) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(program, passes, ctx)
    monkeypatch.undo()
    observed: list[str] = []
    real = CalibrationWalk.statistics

    def statistics(self: CalibrationWalk, sites: Sequence[WeightSite], needs: Need) -> Statistics:
        observed.append(sites[0].name)
        return real(self, sites, needs)

    monkeypatch.setattr(CalibrationWalk, "statistics", statistics)
    program, ctx = with_checkpoint(tmp_path / "ckpt")
    outcome = run_pipeline(program, passes, ctx)
    assert all(torch.equal(a, b) for a, b in zip(payloads(outcome.program), want, strict=True))
    assert ctx.checkpoint is not None and ctx.checkpoint.reused == after
    assert len(observed) == 4 - after
    assert len(outcome.reports[2].taken) == 4


def test_damaged_checkpoint_files_are_done_again(tmp_path: Path) -> None:
    passes = [parse_pass(s) for s in RECIPE]
    program, ctx = with_checkpoint(tmp_path / "ckpt")
    want = payloads(run_pipeline(program, passes, ctx).program)
    broken = sorted((tmp_path / "ckpt").glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:40])
    program, ctx = with_checkpoint(tmp_path / "ckpt")
    assert all(torch.equal(a, b) for a, b in zip(payloads(run_pipeline(program, passes, ctx).program), want, strict=True))
    assert ctx.checkpoint is not None and ctx.checkpoint.reused == 3


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with_checkpoint(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="belongs to another"):
        with_checkpoint(tmp_path / "ckpt", seed=1)
    with pytest.raises(CheckpointError, match="belongs to another"):
        with_checkpoint(tmp_path / "ckpt", recipe=("fold_affine",))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        with_checkpoint(tmp_path / "file")


def test_plans_see_what_earlier_passes_leave_and_nothing_runs_when_a_later_one_is_illegal() -> None:
    program, ctx = conv_net()
    with pytest.raises(PassError, match="prune before quantizing"):
        run_pipeline(program, [parse_pass("quantize_rtn{bits=4}"), parse_pass("prune_magnitude{sparsity=0.5}")], ctx)
    planned = plan_passes(program, [parse_pass("quantize_rtn{bits=4,only=[conv]}"), parse_pass("quantize_rtn{bits=8}")], ctx)
    assert [s.site for s in planned[1].plan.skips] == ["conv"]
    assert planned[0].bytes_after == planned[1].bytes_before < planned[0].bytes_before


def test_planned_bytes_equal_real_bytes() -> None:
    program, ctx = conv_net()
    passes = [parse_pass(s) for s in RECIPE]
    planned = plan_passes(program, passes, ctx)
    outcome = run_pipeline(program, passes, ctx)
    assert planned[-1].bytes_after == outcome.program.nbytes
    for plan, report in zip(planned, outcome.reports, strict=True):
        assert [d.bytes_after for d in plan.plan.decisions] == [r.bytes_after for r in report.taken]


def test_the_pipelines_guarantee_is_the_weakest_of_its_parts() -> None:
    program, ctx = conv_net()
    for specs, want in ((RECIPE[:1], Guarantee.EXACT), (("fold_affine", "quantize_rtn{bits=8}"), Guarantee.BOUNDED), (RECIPE, Guarantee.CALIBRATED)):
        assert run_pipeline(program, [parse_pass(s) for s in specs], ctx).guarantee is want


def test_dry_run_prints_plan_bytes_time_and_memory_and_touches_nothing() -> None:
    program, ctx = conv_net()
    before = program.to_text()
    text = str(dry_run(program, [parse_pass(s) for s in (*RECIPE[:2], "quantize_gptq{bits=4,group_size=16}")], ctx))
    assert "fold_affine: 1 sites taken" in text and "MiB at peak" in text and " s and " in text
    assert "group_size=16 is wider than the 9 columns" in text
    assert program.to_text() == before


@pytest.mark.parametrize(("pattern", "hit"), [("conv*", True), ("*wise", False), ("re:^c.n", True), ("re:z", False)])
def test_name_patterns(pattern: str, hit: bool) -> None:
    assert matches("conv", pattern) is hit


def test_a_bad_regular_expression_is_refused() -> None:
    with pytest.raises(SpecError, match="not a regular expression"):
        matches("conv", "re:(")


def test_only_and_skip_select_sites() -> None:
    program, ctx = conv_net()
    outcome = run_pipeline(program, [parse_pass("quantize_rtn{bits=8,only=['re:^(conv|head)$'],skip=[head]}")], ctx)
    assert [t.site for t in outcome.reports[0].taken] == ["conv"]
    assert {s.site: s.why for s in outcome.reports[0].skipped}["head"] == "matched skip pattern 'head'"
