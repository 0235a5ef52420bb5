"""SparseGPT against a plain float64 implementation of its algorithm, against magnitude and Wanda, and with zeros, groups, sharing and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import Statistics, as_calls
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.column_solver import factor
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.prune_sparsegpt import PruneSparsegpt, sweep
from fxpress.passes.removal import balanced, unstructured

from .nets import conv_net, correlated, output_error, tied_net

PUBLISHED = "search=0,refine=0"
ALIVE = torch.zeros(80, dtype=torch.bool)


def layer(columns: int = 80, rows: int = 12) -> tuple[Tensor, Tensor]:
    """A weight and the Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / 10
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def reference(weight: Tensor, gram: Tensor, damping: float, *, block: int = 0, sparsity: float = 0.0, pattern: tuple[int, int] = (0, 0)) -> Tensor:
    """Algorithm 1 of the paper, one weight at a time: optimal brain surgeon steps from explicit inverses of the remaining columns (no Cholesky)."""
    w, h = weight.double().clone(), gram.double()
    rows, columns = w.shape
    h = h + damping * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype)
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(columns)]
    mask = torch.zeros_like(w, dtype=torch.bool)
    width = pattern[1] or block
    for j in range(columns):
        if j % width == 0:
            piece = range(j, min(j + width, columns))
            saliency = torch.stack([w[:, c].square() / inverses[c][0, 0] for c in piece], 1)
            mask[:, j : j + width] = _lowest(saliency, sparsity, pattern)
        for r in range(rows):
            if mask[r, j]:
                w[r, j:] -= w[r, j] / inverses[j][0, 0] * inverses[j][0]
                w[r, j] = 0.0
    return w


def _lowest(saliency: Tensor, sparsity: float, pattern: tuple[int, int]) -> Tensor:
    if pattern[1]:
        return saliency <= saliency.sort(1).values[:, pattern[1] - pattern[0] - 1 : pattern[1] - pattern[0]]
    return saliency <= saliency.flatten().sort().values[round(sparsity * saliency.numel()) - 1]


@pytest.mark.parametrize("block", [16, 32, 80, 128])
def test_unstructured_equals_the_papers_algorithm(block: int) -> None:
    weight, gram = layer()
    upper = factor(gram, damping=0.01, act_order=False, where="test").upper
    got, removed = sweep(weight, upper, unstructured(weight, ALIVE, round(0.5 * weight.numel()), block))
    want = reference(weight, gram, 0.01, block=block, sparsity=0.5)
    assert torch.equal(got == 0, removed)
    assert torch.equal(removed, want == 0)
    assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "3:5", "4:8", "4:16"])
def test_balanced_equals_the_papers_algorithm(pattern: str) -> None:
    weight, gram = layer()
    keep, group = (int(n) for n in pattern.split(":"))
    upper = factor(gram, damping=0.01, act_order=False, where="test").upper
    got, _ = sweep(weight, upper, balanced(weight, ALIVE, pattern))
    want = reference(weight, gram, 0.01, pattern=(keep, group))
    assert ((got.unflatten(1, (-1, group)) == 0).sum(-1) == group - keep).all()
    assert torch.equal(got == 0, want == 0)
    assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-4)


def test_patterns_do_not_depend_on_how_work_is_gathered() -> None:
    weight, gram = layer(320)
    upper = factor(gram, damping=0.01, act_order=False, where="test").upper
    want = reference(weight, gram, 0.01, pattern=(16, 32))
    got, _ = sweep(weight, upper, balanced(weight, torch.zeros(320, dtype=torch.bool), "16:32"))
    assert torch.equal(got == 0, want == 0)
    assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", ["sparsity=0.5", "sparsity=0.7", "pattern=2:4"])
def test_beats_magnitude_and_wanda_and_each_addition_beats_the_published_method(options: str) -> None:
    program, ctx = conv_net()
    specs = ("prune_magnitude{%s}", "prune_wanda{%s}", "prune_sparsegpt{%s,search=0,refine=0}", "prune_sparsegpt{%s,search=0}", "prune_sparsegpt{%s}")
    errors = []
    for spec in specs:
        one = replace(parse_pass(spec % options), only=("hidden",))
        errors.append(output_error(program, run_pipeline(program, [one], ctx).program, ctx))
    magnitude, wanda, published, refitted, searched = errors
    assert published < 0.9 * min(magnitude, wanda)
    assert searched < refitted < published


def test_counts_are_exact_at_every_kind_of_site() -> None:
    program, ctx = conv_net()
    for spec, share in ((f"sparsity=0.37,{PUBLISHED}", 0.37), ("sparsity=0.37", 0.37), ("sparsity=0.61,block_size=7", 0.61)):
        outcome = run_pipeline(program, [parse_pass(f"prune_sparsegpt{{{spec}}}")], ctx)
        assert [t.site for t in outcome.reports[0].taken] == ["conv", "depthwise", "hidden", "head"]
        for site, taken in zip(outcome.program.sites(), outcome.reports[0].taken, strict=True):
            assert int((site.matrix() == 0).sum()) == round(share * site.parameters)
            assert taken.facts["sparsity"] == pytest.approx(share, abs=0.5 / site.parameters + 1e-6)
            assert 0 < taken.facts["output_error"] < taken.facts["relative_error"] < 1


def test_the_given_program_is_never_changed() -> None:
    program, ctx = conv_net()
    before = {k: v.clone() for k, v in program.graph_module.state_dict().items()}
    for spec in (f"sparsity=0.9,{PUBLISHED}", "sparsity=0.5", "pattern=1:3"):
        run_pipeline(program, [parse_pass(f"prune_sparsegpt{{{spec}}}")], ctx)
    assert all(torch.equal(v, program.graph_module.state_dict()[k]) for k, v in before.items())


def test_sparsity_zero_is_the_identity() -> None:
    program, ctx = conv_net()
    done = run_pipeline(program, [PruneSparsegpt(sparsity=0.0)], ctx).program
    for before, after in zip(program.sites(), done.sites(), strict=True):
        assert torch.equal(before.matrix(), after.matrix())


def test_conv_groups_are_pruned_each_under_its_own_gram() -> None:
    torch.manual_seed(0)
    both = nn.Conv2d(8, 6, 3, groups=2, bias=False)
    program = capture(nn.Sequential(both).eval(), (correlated(4, 8, 6, 6),))
    ctx = Context(calibration=as_calls([correlated(4, 8, 6, 6, seed=s) for s in range(6)], program.inputs))
    outcome = run_pipeline(program, [PruneSparsegpt(sparsity=0.5)], ctx)
    assert outcome.reports[0].taken[0].facts["output_error"] == pytest.approx(output_error(program, outcome.program, ctx), rel=1e-4)
    whole = outcome.program.sites()[0].matrix()
    for group in (0, 1):
        part = nn.Conv2d(4, 3, 3, bias=False)
        part.weight.data = both.weight.data[3 * group : 3 * group + 3].clone()
        half = capture(nn.Sequential(part).eval(), (torch.zeros(4, 4, 6, 6),))
        calls = [(call[0][0][:, 4 * group : 4 * group + 4],) for call in ctx.calibration]
        alone = run_pipeline(half, [PruneSparsegpt(sparsity=0.5)], Context(calibration=as_calls(calls, half.inputs))).program.sites()[0].matrix()
        assert torch.allclose(whole[3 * group : 3 * group + 3], alone, rtol=1e-4, atol=1e-5)


def prune(weight: Tensor, gram: Tensor, spec: str) -> Tensor:
    """The pass on one bare linear layer."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    site = capture(nn.Sequential(linear).eval(), (torch.zeros(2, weight.shape[1]),)).sites()[0]
    one = parse_pass(f"prune_sparsegpt{{{spec}}}")
    assert isinstance(one, PruneSparsegpt)
    return one.prune(site, weight, one.decide(site, Context()), Statistics(tokens=400, gram=gram.unsqueeze(0).clone()))[0]


@pytest.mark.parametrize("more", [PUBLISHED, "search=10"])
def test_columns_no_data_reached_go_first_and_do_no_harm(more: str) -> None:
    weight, gram = layer()
    dead = torch.arange(80) % 4 == 1
    gram[dead], gram[:, dead] = 0.0, 0.0
    less, exact, half = (prune(weight, gram, f"sparsity={s},{more}") for s in (0.2, 0.25, 0.5))
    assert torch.allclose(less[:, ~dead], weight[:, ~dead], rtol=1e-4, atol=1e-4)
    assert int((less == 0).sum()) == round(0.2 * weight.numel())
    assert not exact[:, dead].any() and torch.allclose(exact[:, ~dead], weight[:, ~dead], rtol=1e-4, atol=1e-4)
    assert not half[:, dead].any() and int((half == 0).sum()) == weight.numel() // 2
    balanced_ = prune(weight, gram, f"pattern=3:4,{more}")
    assert torch.equal(balanced_ == 0, dead.expand_as(weight))


@pytest.mark.parametrize("more", [PUBLISHED, "search=10"])
def test_zeros_on_entry_stay_and_count(more: str) -> None:
    weight, gram = layer()
    weight[3], weight[:, 5] = 0.0, 0.0
    zeros = weight == 0
    done = prune(weight, gram, f"sparsity=0.5,{more}")
    assert not done[zeros].any() and int((done == 0).sum()) == weight.numel() // 2
    assert torch.equal(prune(weight, gram, f"sparsity=0.01,{more}") == 0, zeros)
    assert not prune(torch.zeros(4, 80), gram, f"pattern=2:4,{more}").any()
    assert torch.isfinite(prune(weight, torch.zeros(80, 80), f"sparsity=0.5,{more}")).all()


def test_the_search_is_never_worse_than_the_sweep() -> None:
    for columns in (8, 16, 24):
        weight, gram = layer(columns, 3)
        jitter = 0.01 * gram.diagonal().mean() * torch.eye(columns)
        deltas = [prune(weight, gram, f"sparsity=0.6,{more}") - weight for more in (PUBLISHED, "search=1,refine=0", "search=30")]
        first, *others = [float(((d @ (gram + jitter)) * d).sum()) for d in deltas]
        assert all(e <= first * (1 + 1e-5) for e in others)


def test_embeddings_are_skipped_and_tied_heads_untied_on_demand() -> None:
    program, ctx = tied_net()
    outcome = run_pipeline(program, [PruneSparsegpt(sparsity=0.5)], ctx)
    assert [t.site for t in outcome.reports[0].taken] == ["up", "down"]
    assert "tied to embed" in next(s.why for s in outcome.reports[0].skipped if s.site == "head")
    sites = {s.name: s for s in run_pipeline(program, [PruneSparsegpt(sparsity=0.5, untie=True)], ctx).program.sites()}
    assert float((sites["head"].matrix() == 0).float().mean()) == 0.5
    assert torch.equal(sites["embed"].matrix(), next(s for s in program.sites() if s.name == "embed").matrix())


def matrices(program: Program) -> list[Tensor]:
    return [s.matrix() for s in program.sites()]


def test_runs_are_deterministic_and_the_modes_differ() -> None:
    program, ctx = conv_net()
    on, again, off = (matrices(run_pipeline(program, [PruneSparsegpt(sparsity=0.5, sequential=s)], ctx).program) for s in (True, True, False))
    assert all(torch.equal(a, b) for a, b in zip(on, again, strict=True))
    assert torch.equal(on[0], off[0])
    assert not all(torch.equal(a, b) for a, b in zip(on, off, strict=True))


def test_gptq_keeps_the_zeros_and_a_run_resumes_bit_equal(tmp_path: Path) -> None:
    passes = [parse_pass("prune_sparsegpt{sparsity=0.5}"), parse_pass("quantize_gptq{bits=4,group_size=8}")]
    program, ctx = conv_net()
    plain = run_pipeline(program, passes, ctx)
    assert "all stayed exactly zero" in plain.reports[1].notes[0]
    for matrix, taken in zip(matrices(plain.program), plain.reports[0].taken, strict=True):
        assert float((matrix == 0).float().mean()) >= taken.facts["sparsity"] - 1e-6
    run_pipeline(program, passes, replace(ctx, checkpoint=Checkpoint(tmp_path, "mark")))
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    resumed = replace(ctx, checkpoint=Checkpoint(tmp_path, "mark"))
    done = run_pipeline(program, passes, resumed)
    assert resumed.checkpoint is not None and resumed.checkpoint.reused == 3
    assert all(torch.equal(a, b) for a, b in zip(matrices(done.program), matrices(plain.program), strict=True))
