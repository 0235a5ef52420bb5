"""The cost model: its arithmetic, which forms it considers, and what lowering makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import fxpress
from fxpress.codegen.triton_target import Triton
from fxpress.codegen.triton_target.cost import Device, device_named, estimates
from fxpress.codegen.triton_target.layout import Structure, Values
from fxpress.codegen.triton_target.slots import Outliers
from fxpress.ir.errors import LowerError

from .weights import DEVICE, kept_of_group, random_mask, random_source

SLOW = Device(name="slow", architecture=80, multiprocessors=1, clock=1.0, bandwidth=1e6)  # only instructions count
NARROW = Device(name="narrow", architecture=80, multiprocessors=1000, clock=10.0, bandwidth=1.0)  # only bytes count


def test_the_longer_of_bytes_and_instructions_counts() -> None:
    assert NARROW.nanoseconds(16, 100) == 2.0
    assert SLOW.nanoseconds(16, 256) == 2.0


@pytest.mark.parametrize(("name", "budget"), [("a100", 9.6), ("h100", 8.9), ("h200", 6.2), ("rtx4090", 41), ("a6000", 25)])
def test_instructions_for_every_byte_are_those_of_the_data_sheets(name: str, budget: float) -> None:
    device = device_named(name)
    assert device.issue_rate / device.bandwidth == pytest.approx(budget, rel=0.02)


def test_forms_that_do_not_hold_the_weight_are_not_considered() -> None:
    def forms(kind: Values, mask: torch.Tensor) -> set[Structure]:
        return {e.structure for e in estimates(random_source(kind, torch.float16, mask)[0], NARROW)}

    full = torch.ones(16, 128, dtype=torch.bool)
    assert forms(Values.HALF, random_mask(16, 128, 0.7)) == {Structure.BITMAP}
    assert forms(Values.CODE4, full) == {Structure.DENSE, Structure.BITMAP}
    assert forms(Values.HALF, kept_of_group(16, 128, 2, 4)) == {Structure.TWO_OF_FOUR, Structure.BALANCED, Structure.BITMAP}
    assert forms(Values.ROWS, kept_of_group(16, 128, 16, 32)) == {Structure.BALANCED}


def test_outliers_cost_bytes_and_instructions() -> None:
    source = random_source(Values.SHARED, torch.float16, torch.ones(16, 128, dtype=torch.bool))[0]
    first = torch.arange(16)
    more = replace(source, outliers=Outliers(row=first, column=first, value=first.half()))
    plain, added = estimates(source, NARROW)[0], estimates(more, NARROW)[0]
    assert added.bits == pytest.approx(plain.bits + 48 / 128) and added.instructions > plain.instructions + 2 and added.speedup < plain.speedup


def test_bytes_decide_on_one_device_and_instructions_on_the_other() -> None:
    source = random_source(Values.CODE4, torch.float16, kept_of_group(64, 1024, 16, 32))[0]
    assert estimates(source, NARROW)[0].structure is Structure.BALANCED
    assert estimates(source, SLOW)[0].structure is Structure.DENSE


def test_lowering_for_a_device_takes_the_fastest_form() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).half(), torch.randn(3, 256).half()
    pruned = ["prune_magnitude{pattern=16:32,only=['0']}", "quantize_rtn{bits=4,group_size=128,only=['0']}", "prune_magnitude{sparsity=0.08,only=['1']}"]
    result = fxpress.optimize(model, [*pruned, "store_sparse"], example_inputs=(x,))
    lowered = result.lower_with_report("triton", device="h100")
    first, second = lowered.report.sites
    assert "(dense, code4" in first.form, "4.2 instructions and 4.25 bits beat 9.5 instructions and 3.25 bits where instructions are the limit"
    assert second.why == "decoded: no form is faster than dense on h100: bitmap would reach 0.61x"
    torch.testing.assert_close(lowered.artifact.to(DEVICE).run_examples().cpu(), result.lower("reference").run_examples(), rtol=2e-2, atol=2e-3)
    assert "(balanced, code4" in Triton().lower(result.program).report.sites[0].form
    assert "fxpress_triton.linear (dense, code4" in str(lowered.report)


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(LowerError, match=r"unknown device 'h10'.*h100.*the cost model knows a100"):
        device_named("h10")
