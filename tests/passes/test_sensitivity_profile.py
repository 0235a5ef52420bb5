"""Sensitivity profiles: kinds by structure, measured ratios, interpolation over depth, inversion, recipes, refusals."""

from __future__ import annotations

from functools import cache
from math import exp

import pytest
import torch

from fxpress.ir.capture import capture
from fxpress.ir.errors import CalibrationError, PassError
from fxpress.ir.program import Program
from fxpress.ir.structure import find_structure
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.examples import Example
from fxpress.passes.factorize_mpo import FactorizeMpo
from fxpress.passes.factorize_svd import FactorizeSvd
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.sensitivity_profile import Kind, Point, Profile, sensitivity_profile, site_places
from fxpress.passes.structured.loss import task_criterion
from fxpress.passes.tapped import Tapped

from ..tiny import Mlp, fresh_program, tokens


@cache
def _llama() -> tuple[Program, Context]:
    program = fresh_program("llama")
    batches = [{"input_ids": tokens(2, 12, seed=s), "attention_mask": torch.ones(2, 12, dtype=torch.int64)} for s in range(2)]
    return program, Context(calibration=as_calls(batches, program.inputs))


def test_kinds_come_from_the_structure() -> None:
    places = site_places(find_structure(_llama()[0]))
    wanted = {"q_proj": Kind.QUERY, "k_proj": Kind.KEY, "v_proj": Kind.VALUE, "o_proj": Kind.OUTPUT}
    wanted |= {"gate_proj": Kind.GATE, "up_proj": Kind.UP, "down_proj": Kind.DOWN}
    assert len(places) == 14 and all(wanted[name.rsplit(".", 1)[1]] is kind for name, (kind, _) in places.items())
    assert {layer for _, layer in places.values()} == {0, 1}


def test_ratios_are_those_of_the_factorized_program() -> None:
    program, ctx = _llama()
    profile = sensitivity_profile(program, ctx, ratios=(0.5,), depths=1)
    assert {p.layer for p in profile.points} == {0} and {p.kind for p in profile.points} == set(Kind) - {Kind.QKV}
    point = next(p for p in profile.points if p.kind is Kind.DOWN)
    done = run_pipeline(program, [FactorizeSvd(ratio=0.5, only=(point.site,))], ctx).program
    criterion = task_criterion(program, ctx)
    losses = []
    for one in (program, done):
        replies = [Tapped(one)(call) for call in ctx.calibration]
        labels = [program.inputs.flatten(*c) for c in ctx.calibration]
        losses.append(sum(float(criterion(Example(c), leaves, r, None)) for c, leaves, r in zip(ctx.calibration, labels, replies, strict=True)) / 2)
    assert point.loss_ratio == pytest.approx(exp(losses[1] - losses[0]), rel=1e-4)
    assert profile.to_dict()["points"][0]["kind"] == "query"


def _profile() -> Profile:
    measured = {0: [(0.2, 2.0), (0.6, 1.2), (0.4, 1.3)], 4: [(0.2, 1.1), (0.4, 1.0), (0.6, 1.02)]}
    points = [Point(site=f"s{m}", kind=Kind.UP, layer=m, kept=k, loss_ratio=r) for m, found in measured.items() for k, r in found]
    return Profile(points=tuple(points), places={f"s{m}": (Kind.UP, m) for m in range(6)})


def test_a_ratio_is_inverted_and_interpolated() -> None:
    profile = _profile()
    assert profile.kept_share("s0", 1.25) == pytest.approx(0.5) and profile.kept_share("s0", 1.1) == pytest.approx(0.8)
    assert profile.kept_share("s4", 1.1) == 0.2 and profile.kept_share("s4", 1.055) == pytest.approx(0.3)  # 1.0 and 1.02 are pooled to 1.01
    assert profile.kept_share("s2", 1.1) == pytest.approx(0.5) and profile.kept_share("s5", 1.1) == 0.2
    assert profile.kept_share("s0", 1.0) == 1.0
    recipe = profile.recipe(1.1)
    assert {(one.ratio, one.only) for one in recipe if isinstance(one, FactorizeSvd)} == {
        (0.2, ("s4", "s5")), (0.35, ("s3",)), (0.5, ("s2",)), (0.65, ("s1",)), (0.8, ("s0",)),
    }  # fmt: skip
    with pytest.raises(PassError, match="'other' is not one of its 6 sites"):
        profile.kept_share("other", 1.1)


def test_a_recipe_runs() -> None:
    program, ctx = _llama()
    profile = sensitivity_profile(program, ctx, ratios=(0.3, 0.8), depths=2, method=lambda r: FactorizeMpo(ratio=r, family=1))
    recipe = profile.recipe(1.5, lambda ratio, only: FactorizeMpo(ratio=ratio, family=1, only=only, allow_empty=True))
    done = run_pipeline(program, recipe, ctx).program
    assert done.parameters < program.parameters


class _Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(16, 20, 16), Mlp(16, 20, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        out: torch.Tensor = x + self.second(x)
        return out


def test_refusals() -> None:
    with pytest.raises(CalibrationError, match="pass calibration="):
        sensitivity_profile(_llama()[0], Context())
    x = torch.ones(2, 16)
    plain, block = capture(torch.nn.Linear(16, 4), (x,)), capture(_Residual(), (x,))
    with pytest.raises(PassError, match="no attention and no feed-forward linears"):
        sensitivity_profile(plain, Context(calibration=as_calls([x], plain.inputs)))
    with pytest.raises(CalibrationError, match="labelled training batches"):
        sensitivity_profile(block, Context(calibration=as_calls([x], block.inputs)))
