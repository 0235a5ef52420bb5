"""Batch norms' statistics taken anew equal those of the data, in order; what cannot be renewed says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import CalibrationError, PassError
from fxpress.ir.journal import Action
from fxpress.ir.program import Program
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.recalibrate_norms import RecalibrateNorms


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    return net.append(nn.BatchNorm1d(5)).eval().double()


def _batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 2 + 1 for i in range(count)]


def _run(net: nn.Module, batches: list[Tensor], **options: Any) -> tuple[Program, Any]:
    program = capture(net, (batches[0],), dynamic_shapes={"input": {0: torch.export.Dim("batch", min=2)}})
    result = run_pipeline(program, [RecalibrateNorms(**options)], Context(calibration=as_calls(batches, program.inputs)))
    return result.program, result.reports[0]


@torch.no_grad()
def _renewed(net: nn.Sequential, x: Tensor) -> Tensor:
    """Layer by layer by hand."""
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            flat = x.movedim(1, 0).flatten(1)
            layer.running_mean, layer.running_var = flat.mean(1), flat.var(1)
        x = layer(x)
    return x


def test_statistics_equal_those_of_all_data_in_order() -> None:
    net = _net()
    program, report = _run(net, _batches())
    everything = torch.cat(_batches())
    torch.testing.assert_close(program.run(everything), _renewed(net, everything), rtol=1e-10, atol=1e-10)
    assert [t.site for t in report.taken] == ["1", "4", "8"]
    assert all(t.facts["mean_moved"] > 0 for t in report.taken)
    changes = [c for c in program.journal.changes if c.action is Action.REWEIGHTED]
    assert len(changes) == 3 and changes[0].why == "statistics taken anew"


def test_batches_of_any_size_weigh_by_what_they_hold() -> None:
    parts = _batches(2)
    first, _ = _run(_net(), [parts[0], parts[1][:2]])
    again, _ = _run(_net(), [torch.cat([parts[0], parts[1][:2]])])
    torch.testing.assert_close(first.run(parts[0]), again.run(parts[0]), rtol=1e-12, atol=1e-12)


def test_renewing_twice_changes_nothing_more() -> None:
    program, _ = _run(_net(), _batches())
    again = run_pipeline(program, [RecalibrateNorms()], Context(calibration=as_calls(_batches(), program.inputs)))
    assert all(t.facts["mean_moved"] < 1e-12 and t.facts["variance_ratio"] == pytest.approx(1) for t in again.reports[0].taken)


def test_a_scale_put_on_the_weights_before_a_norm_is_undone() -> None:
    net = _net()
    everything = torch.cat(_batches())
    y = _renewed(net, everything)
    for i, scale in ((0, 0.5), (3, 3.0), (7, 0.7)):
        weight, bias = net[i].parameters()
        weight.data *= scale
        bias.data += 1.0
    assert float((net(everything) - y).detach().norm()) > 0.3 * float(y.norm())
    program, report = _run(net, _batches())
    torch.testing.assert_close(program.run(everything), y, rtol=1e-3, atol=1e-3)  # but for the norms' eps
    assert report.taken[0].facts["variance_ratio"] == pytest.approx(0.25, rel=1e-6)


def test_only_and_skip_match_module_paths() -> None:
    _, report = _run(_net(), _batches(), only=("4",))
    assert [t.site for t in report.taken] == ["4"] and {s.site for s in report.skipped} == {"1", "8"}


def test_what_cannot_be_renewed_says_why() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.norm(x) * 2)
            return out

    x = torch.randn(2, 3, 4, 4)
    program = capture(Twice().eval(), (x,))
    with pytest.raises(PassError, match="serve several places"):
        run_pipeline(program, [RecalibrateNorms()], Context(calibration=as_calls([x], program.inputs)))


def test_no_data_and_a_single_value_are_refused() -> None:
    program = capture(_net(), (_batches()[0],))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run_pipeline(program, [RecalibrateNorms()], Context())
    one = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    program = capture(one, (torch.randn(1, 3),))
    with pytest.raises(CalibrationError, match="a variance takes two"):
        run_pipeline(program, [RecalibrateNorms()], Context(calibration=as_calls([torch.randn(1, 3)], program.inputs)))
