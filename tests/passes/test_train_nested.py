"""Nested training: smaller widths gain, runs resume, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxpress
from fxpress.ir.errors import PassError, SpecError, TrainingError
from fxpress.ir.nodes import get_tensor
from fxpress.passes.base import parse_pass

from ..checks import assert_same
from ..tiny import fresh_program
from .nesting.nets import nested
from .test_decompose_modules import data

SPEC = "train_nested{steps=30,lr=3e-3,evaluate_every=10,widths=[0.25,0.5,1.0],probabilities=[0.3,0.3,0.4]}"


def train(spec: str = SPEC, **options: Any) -> Any:
    return fxpress.optimize(nested("llama")[0], spec, calibration=data("llama", 6), **options)


def losses(result: Any) -> list[list[float]]:
    """Before and after, by width."""
    found = [n.split("loss ")[1].split(" -> ") for n in result.reports[0].notes if n.startswith("width")]
    return [[float(a), float(b)] for a, b in found]


@pytest.mark.parametrize("joint", ["", "joint=true,", "joint=true,mixes=2,"])
def test_smaller_widths_gain(joint: str) -> None:
    found = losses(train(SPEC.replace("{", "{" + joint)))
    assert len(found) == 3 and found[0][1] < found[0][0]
    assert sum(after for _, after in found) < sum(before for before, _ in found)


def test_the_probabilities_weight_joint_losses() -> None:
    only = "probabilities=[0.0,0.0,1.0]"
    drawn, joint = (train(SPEC.replace("probabilities=[0.3,0.3,0.4]", only + extra)) for extra in ("", ",joint=true"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert_same(get_tensor(joint.program.graph_module, name).detach(), get_tensor(drawn.program.graph_module, name).detach())
    assert drawn.reports[0].history[0][0] == 0 and len(drawn.reports[0].history) == 4


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = train()
    with pytest.raises(KeyboardInterrupt):
        _killed(tmp_path / "run")
    resumed = train(SPEC.replace("evaluate_every=10", "evaluate_every=10,checkpoint_every=5"), checkpoint_dir=tmp_path / "run")
    name = "model.layers.0.mlp.down_proj.weight"
    assert_same(get_tensor(resumed.program.graph_module, name).detach(), get_tensor(whole.program.graph_module, name).detach())


def _killed(folder: Path) -> None:
    from fxpress.passes.nesting import trainer

    plain = trainer.NestedTrainer._loss
    seen = 0

    def loss(self: trainer.NestedTrainer, item: Any, tensors: Any) -> Any:
        nonlocal seen
        seen += not isinstance(item, tuple)
        if seen > 17:
            raise KeyboardInterrupt
        return plain(self, item, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.NestedTrainer, "_loss", loss)
        train(SPEC.replace("evaluate_every=10", "evaluate_every=10,checkpoint_every=5"), checkpoint_dir=folder)


def test_refusals() -> None:
    with pytest.raises(PassError, match="in no order of importance; put nest before"):
        fxpress.optimize(fresh_program("llama"), SPEC, calibration=data("llama"))
    with pytest.raises(TrainingError, match="needs data"):
        fxpress.optimize(nested("llama")[0], SPEC)
    for spec, text in (
        ("widths=[0.5,0.25]", "rise up to 1"), ("widths=[]", "rise up to 1"), ("mixes=3", "need joint=true"), ("widths=[0.5,1.5]", "rise up to 1"),
        ("probabilities=[1.0]", "one probability for each of the 4 widths"), ("widths=[0.5,1.0],probabilities=[-1.0,2.0]", "none negative"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=text):
            parse_pass(f"train_nested{{{spec}}}")
    assert torch.is_tensor(get_tensor(fresh_program("mlp").graph_module, "up.weight"))
