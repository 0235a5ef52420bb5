"""Migration leaves the function alone, never makes the simulated error larger, and helps quantizers where a few inputs are huge."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import CalibrationError, PassError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.journal import Action
from fxpress.ir.program import Program
from fxpress.ir.sites import site_named
from fxpress.ir.structure import ScaleKind, find_structure
from fxpress.passes import migrate_scales
from fxpress.passes.base import Pass, SiteResult, parse_pass
from fxpress.passes.calibrate import Statistics, as_calls
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Call, Context
from fxpress.passes.migrate_scales import Method, MigrateScales
from fxpress.passes.pipeline import Outcome, run_pipeline
from fxpress.passes.ranges import RangeSearch
from tests import attention_models, tiny
from tests.masking import double, doubled, outputs
from tests.tiny import randn, seeded

from .nets import output_error

ZOO = ("mlp", "conv", "depthwise", "conv1d", "llama", "llama_eager", "opt", "gpt2", "bert", "vit", "resnet", "convnext")
WRITTEN = ("qk_norm", "one_key_head", "fused_groups", "parallel", "cross")


@cache
def wide(name: str) -> tuple[Program, Context]:
    """A model in double precision, calibrated on its example inputs."""
    program = attention_models.program(name) if name in WRITTEN else double(tiny.fresh_program(name))
    inputs = program.inputs
    call: Call = (doubled(inputs.args), doubled(inputs.kwargs))
    return program, Context(calibration=(call,))


def change(before: Program, after: Program) -> float:
    pairs = zip(outputs(before), outputs(after), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("spec", ["{bits=3,grid=5}", "{method=smoothquant,alpha=0.4}"])
@pytest.mark.parametrize("name", [*ZOO, *WRITTEN])
def test_the_function_is_unchanged_and_the_error_never_larger(name: str, spec: str) -> None:
    program, ctx = wide(name)
    done = run_pipeline(program, [parse_pass("migrate_scales" + spec)], ctx)
    assert change(program, done.program) < 1e-9
    moved = [r for r in done.reports[0].taken if r.facts["alpha"] > 0]
    assert moved
    changed = {s.name for s, t in zip(program.sites(), done.program.sites(), strict=True) if not torch.equal(s.matrix(), t.matrix())}
    assert {r.site for r in moved} <= changed
    if "smooth" not in spec:
        assert all(r.facts["error_after"] <= r.facts["error_before"] for r in done.reports[0].taken)
        gained = any(r.facts["error_after"] < 0.99 * r.facts["error_before"] for r in moved)
        assert gained or name == "depthwise", "a depthwise consumer has its own range a channel: nothing to gain"


def test_all_kinds_of_pairs_are_met_above() -> None:
    met = {(p.kind, name) for name in ("llama", "resnet", "fused_groups") for p in find_structure(wide(name)[0]).scale_pairs}
    assert {kind for kind, _ in met} == set(ScaleKind)


class Planted(nn.Module):
    """A norm whose result has a few huge channels, read by two linears, and a third behind relu with a few huge inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 32)
        with torch.no_grad():
            self.norm.weight[[3, 17, 40]] = torch.tensor([30.0, -45.0, 60.0])
            self.up.weight[:4] *= 20

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 64] -> [B, 32]`."""
        x = self.norm(x)
        return self.down(torch.sigmoid(self.gate(x) / 100) * torch.relu(self.up(x)))


@cache
def planted(dtype: torch.dtype = torch.float32) -> tuple[Program, Context]:
    torch.manual_seed(0)
    batches = [randn(64, 64, seed=s).to(dtype) for s in range(6)]
    program = capture(Planted().eval().to(dtype), (batches[0],))
    return program, Context(calibration=as_calls(batches, program.inputs))


def run(*passes: Pass | str) -> Outcome:
    program, ctx = planted()
    return run_pipeline(program, [parse_pass(p) for p in passes], ctx)


@pytest.mark.parametrize("quantizer", ["quantize_rtn", "quantize_gptq"])
@pytest.mark.parametrize("options", ["bits=4,group_size=16", "bits=4,group_size=32", "bits=3,group_size=16,search=mse"])
def test_quantizers_lose_less_where_a_few_inputs_are_huge(quantizer: str, options: str) -> None:
    program, ctx = planted()
    plain = run(f"{quantizer}{{{options}}}").program
    helped = run(f"migrate_scales{{{options}}}", f"{quantizer}{{{options}}}").program
    assert output_error(program, helped, ctx) < 0.9 * output_error(program, plain, ctx)


def normalised(program: Program, ctx: Context) -> Tensor:
    """What the norm gives on the calibration data, `[T, 64] f64`, computed by hand."""
    state = dict(program.graph_module.named_parameters())
    x = torch.cat([call[0][0] for call in ctx.calibration]).double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (x * state["norm.weight"].double() + state["norm.bias"].double()).detach()


@pytest.mark.parametrize("options", ["bits=4,group_size=16", "bits=3", "bits=4,symmetric=true,group_size=16"])
def test_reported_errors_are_those_of_rounding(options: str) -> None:
    program, ctx = planted()
    migrated = run(f"migrate_scales{{{options},only=[up,gate]}}")
    [result] = migrated.reports[0].taken
    assert result.facts["alpha"] > 0
    for start, key in ((program, "error_before"), (migrated.program, "error_after")):
        rounded = run_pipeline(start, [parse_pass(f"quantize_rtn{{{options},only=[up,gate]}}")], ctx).program
        rows, sites = normalised(start, ctx), [(site_named(rounded, n).matrix().double(), site_named(start, n).matrix().double()) for n in ("gate", "up")]
        error = sum(float((rows @ (other - weight).T).square().sum()) for other, weight in sites)
        power = sum(float((rows @ weight.T).square().sum()) for _, weight in sites)
        assert result.facts[key] == pytest.approx((error / power) ** 0.5, rel=1e-3)


def test_directions_and_values_of_smoothquant() -> None:
    program, ctx = planted()
    after = run("migrate_scales{method=smoothquant,alpha=0.3,only=[up,gate]}").program
    data = normalised(program, ctx).abs().amax(0)
    weight = torch.cat([site_named(program, n).matrix() for n in ("gate", "up")]).double().abs().amax(0)
    want = data**0.3 / weight**0.7
    for name in ("gate", "up"):
        torch.testing.assert_close(site_named(after, name).matrix().double(), site_named(program, name).matrix().double() * want, rtol=1e-4, atol=1e-7)
    norms = [dict(p.graph_module.named_parameters())["norm.weight"].double() for p in (program, after)]
    torch.testing.assert_close(norms[1], norms[0] / want, rtol=1e-4, atol=1e-7)


def test_awq_gives_large_inputs_large_weights() -> None:
    program, _ = planted()
    after = run("migrate_scales{bits=4,group_size=16}").program
    scales = site_named(after, "gate").matrix().norm(dim=0) / site_named(program, "gate").matrix().norm(dim=0)
    assert set(scales.topk(3).indices.tolist()) == {3, 17, 40}
    assert scales.max() * scales.min() == pytest.approx(1, rel=0.01)


def test_the_plan_names_pairs_and_says_why_sites_are_left_out() -> None:
    program, ctx = wide("llama")
    plan = MigrateScales(kinds=(ScaleKind.NORM, ScaleKind.VALUE), skip=("*.1.mlp.up_proj",)).analyze(program, ctx)
    at = "model.layers.0"
    assert [(d.site, d.action) for d in plan.decisions[:3]] == [
        (f"{at}.self_attn.q_proj", "scale 32 channels into q_proj, k_proj, v_proj"), (f"{at}.self_attn.o_proj", "scale 16 channels into o_proj"),
        (f"{at}.mlp.gate_proj", "scale 32 channels into gate_proj, up_proj"),
    ]  # fmt: skip
    assert all(d.bytes_before == d.bytes_after for d in plan.decisions)
    why = {s.site: s.why for s in plan.skips}
    assert "an embedding sees indices" in why["model.embed_tokens"]
    assert "of kind linear, not in kinds=['norm', 'value']" in why[f"{at}.mlp.down_proj"]
    assert why["model.layers.1.mlp.gate_proj"].startswith("its pair ends in model.layers.1.mlp.up_proj too: matched skip pattern")
    assert set(why) | {c for d in plan.decisions for c in consumers(program, d.site)} == {s.name for s in program.sites()}


def consumers(program: Program, first: str) -> list[str]:
    pair = next(p for p in find_structure(program).scale_pairs if p.consumers[0].name == first)
    return [s.name for s in pair.consumers]


class Reglu(nn.Module):
    """Two producers of one input: `relu(gate(x)) * up(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 16] -> [B, 8]`."""
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def small(model: nn.Module, *shape: int) -> tuple[Program, Context]:
    program = capture(model.eval(), (randn(*shape),))
    return program, Context(calibration=as_calls([randn(*shape, seed=s) for s in range(3)], program.inputs))


def test_an_input_takes_its_scale_from_one_pair() -> None:
    torch.manual_seed(0)
    program, ctx = small(Reglu(), 32, 16)
    assert len(find_structure(program).scale_pairs) == 2
    done = run_pipeline(program, [MigrateScales(bits=3)], ctx)
    assert [r.site for r in done.reports[0].taken] == ["down"]
    assert change(program, done.program) < 1e-5
    assert sum(not torch.equal(s.matrix(), t.matrix()) for s, t in zip(program.sites(), done.program.sites(), strict=True)) == 2


def test_dead_channels_keep_their_scale() -> None:
    program, ctx = planted()
    program = program.clone()
    norm, up, gate = (dict(program.graph_module.named_parameters())[f"{n}.weight"] for n in ("norm", "up", "gate"))
    program.graph_module.norm.weight = nn.Parameter(norm.detach() * (torch.arange(64) != 5))  # type: ignore[union-attr]
    program.graph_module.norm.bias = nn.Parameter(torch.zeros(64))  # type: ignore[union-attr]
    program.graph_module.up.weight = nn.Parameter(up.detach() * (torch.arange(64) != 9))  # type: ignore[union-attr]
    program.graph_module.gate.weight = nn.Parameter(gate.detach() * (torch.arange(64) != 9))  # type: ignore[union-attr]
    for spec in ("migrate_scales{bits=3}", "migrate_scales{method=smoothquant}"):
        after = run_pipeline(program, [parse_pass(spec)], ctx).program
        old, new = (site_named(p, "gate").matrix() for p in (program, after))
        assert torch.equal(old[:, 5], new[:, 5])
        assert torch.equal(dict(after.graph_module.named_parameters())["norm.weight"][9], program.graph_module.norm.weight[9])  # type: ignore[union-attr]
        assert torch.isfinite(new).all() and not torch.equal(old[:, 3], new[:, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_only_by_rounding(dtype: torch.dtype) -> None:
    program, ctx = planted(dtype)
    done = run_pipeline(program, [MigrateScales(bits=4, group_size=16)], ctx)
    assert any(r.facts["alpha"] > 0 for r in done.reports[0].taken)
    assert {s.dtype for s in done.program.sites()} == {dtype}
    assert output_error(program, done.program, ctx) < 0.02


def test_scales_that_overflow_the_dtype_are_left_out() -> None:
    program, ctx = planted(torch.float16)
    program = program.clone()
    down = site_named(program, "down")
    huge = down.matrix().clone()
    huge[0, :3] = 60000.0
    program.graph_module.down.weight = nn.Parameter(huge)  # type: ignore[union-attr]
    done = run_pipeline(program, [MigrateScales(method=Method.SMOOTHQUANT, alpha=1.0, kinds=(ScaleKind.LINEAR,))], ctx)
    [result] = done.reports[0].taken
    assert "left at 1" in result.action and result.facts["alpha"] == 0
    assert all(torch.equal(s.matrix(), t.matrix()) for s, t in zip(program.sites(), done.program.sites(), strict=True))


def test_journal_and_notes() -> None:
    done = run("migrate_scales{bits=4,group_size=16}")
    changes = [c for c in done.program.journal.changes if c.action is Action.REWEIGHTED]
    modules = [c.after.module for c in changes if c.after is not None]
    assert modules == ["norm", "gate", "up", "up", "down"]
    assert "awq: 64 norm scales moved into gate, up" in changes[0].why
    assert {"alpha", "error_before", "error_after"} <= set(changes[0].facts)
    assert "2 of 2 pairs scaled" in done.reports[0].notes[0]


def test_a_finished_search_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, ctx = planted()

    def once() -> tuple[list[Tensor], tuple[SiteResult, ...], int]:
        checkpoint = Checkpoint(tmp_path, "mark")
        done = run_pipeline(program, [MigrateScales(bits=4)], Context(calibration=ctx.calibration, checkpoint=checkpoint))
        return [s.matrix() for s in done.program.sites()], done.reports[0].taken, checkpoint.reused

    first = once()
    (tmp_path / "stage-00-scales-00001.safetensors").unlink()
    second = once()

    def refuse(*_: Any) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(migrate_scales, "awq_scales", refuse)
    third = once()
    assert (first[2], second[2], third[2]) == (0, 1, 2)
    for again in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
        assert first[1] == again[1]


def test_refusals() -> None:
    program, ctx = planted()
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run_pipeline(program, [MigrateScales()], Context())
    with pytest.raises(PassError, match="migrate scales before quantizing"):
        run_pipeline(program, [parse_pass("quantize_rtn{bits=4}"), MigrateScales()], ctx)
    with pytest.raises(PassError, match="group_size=128 is wider than the 64 columns"):
        run_pipeline(program, [MigrateScales(group_size=128)], ctx)
    program, ctx = small(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), 4, 8)
    with pytest.raises(PassError, match="does not commute with a scale"):
        run_pipeline(program, [MigrateScales()], ctx)


def test_scales_of_grouped_heads_come_from_all_their_query_heads() -> None:
    program, _ = wide("llama")
    pair = next(p for p in find_structure(program).scale_pairs if p.kind is ScaleKind.VALUE)
    index = pair.index(*pair.inputs[0])
    gram = torch.zeros(1, 32, 32)
    gram[0].diagonal().copy_(torch.rand(32, generator=seeded(2)))
    one = migrate_scales._Input(pair.consumers[0], index, Statistics(gram=gram))
    scales = migrate_scales.awq_scales([one], pair.size, 0.5)
    means = torch.stack([gram[0].diagonal()[index == i].mean() for i in range(pair.size)]).sqrt().sqrt()
    torch.testing.assert_close(scales, means / (means.max() * means.min()).sqrt())
    assert one.factor(scales).shape == (1, 32)
    assert one.errors(Affine(bits=4), RangeSearch.MIN_MAX, [scales, torch.ones(pair.size)]).min() > 0
