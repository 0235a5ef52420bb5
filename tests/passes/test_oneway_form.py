"""The switch between the two forms: exact both ways, and nothing to do where there is nothing."""

from __future__ import annotations

import pytest
import torch

import fxpress
from fxpress.ir.errors import PassError

from .nets import correlated
from .test_oneway_conv import net


def test_both_ways_and_back_are_exact() -> None:
    x = correlated(4, 8, 12, 14).double()
    factored = fxpress.optimize(net().double(), "oneway_conv{terms=2}", example_inputs=(x,))
    composed = fxpress.optimize(factored.program, "oneway_form{to=composed}")
    back = fxpress.optimize(composed.program, "oneway_form{to=factored}")
    expected = factored.program.run(x)
    for result in (composed, back):
        assert float((result.program.run(x) - expected).abs().max() / expected.abs().max()) < 1e-6
        assert result.program.nbytes == factored.program.nbytes and "exact" in str(result.reports[0].guarantee.value)
    assert [t.site for t in composed.reports[0].taken] == ["0", "2"]
    only = fxpress.optimize(factored.program, "oneway_form{to=composed,only=['2']}")
    assert [s.name for s in only.program.sites()] == ["0.channels", "0.axis0", "0.axis1", "4"] and "not in only" in only.reports[0].skipped[0].why


def test_nothing_to_switch_is_refused() -> None:
    x = correlated(4, 8, 12, 14)
    with pytest.raises(PassError, match="would touch nothing"):
        fxpress.optimize(net(), "oneway_form", example_inputs=(x,))
    factored = fxpress.optimize(net(), "oneway_conv", example_inputs=(x,))
    with pytest.raises(PassError, match="it is factored already"):
        fxpress.optimize(factored.program, "oneway_form{to=factored}")
    assert torch.is_tensor(factored.program.run(x))
