"""The schedule and the bounds of the training options."""

from __future__ import annotations

import pytest

from fxpress.ir.errors import SpecError
from fxpress.passes.training_options import Precision, TrainingOptions


def test_rate_rises_then_falls_towards_zero() -> None:
    options = TrainingOptions(steps=100, lr=1.0, warmup=0.1)
    rates = [options.rate(s) for s in range(100)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < 0.1
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3


def test_one_step_and_no_warmup() -> None:
    assert TrainingOptions(steps=1, lr=0.1).rate(0) == pytest.approx(0.1)
    assert TrainingOptions(steps=10, lr=0.1, warmup=0.0).rate(0) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", ["steps=0", "lr=0", "warmup=1.0", "held_out=0", "objective=both_of_them", "patience=0", "dtype=fp8"])
def test_bounds(wrong: str) -> None:
    key, _, value = wrong.partition("=")
    with pytest.raises(SpecError, match=f"option {key}"):
        TrainingOptions.from_dict({key: value if value.isidentifier() else float(value) if "." in value else int(value)})


def test_precision() -> None:
    assert Precision.FP32.autocast is None and Precision("bf16").autocast is not None
