"""The published refit: least squares on dense inputs, zero where neurons go."""

from __future__ import annotations

import torch

from fxpress.ir.edit import Editor
from fxpress.passes.context import Call, Context
from fxpress.passes.modules.finding import Part, find_modules
from fxpress.passes.modules.refits import refit_by_nystrom
from fxpress.passes.tapped import Tapped

from ... import attention_models
from ...tiny import randn


def test_it_is_the_least_squares_fit() -> None:
    program = attention_models.program("one_key_head")
    module = find_modules(program, (Part.FEED_FORWARD,)).modules[0]
    calls: list[Call] = [((randn(2, 5, 6, seed=i).double(),), {}) for i in range(16)]
    hidden = torch.cat([Tapped(program, [module.output.data.name])(c).hidden[0].flatten(0, 1) for c in calls])
    old, kept = module.output.matrix().clone(), torch.arange(0, 40, 3)
    with Editor(program, "test") as editor:
        errors = refit_by_nystrom(editor, {module: kept}, Context(calibration=calls))
    new = next(s for s in program.sites() if s.name == module.output.name).matrix()
    exact = torch.linalg.lstsq(hidden[:, kept], hidden @ old.t()).solution.t()
    assert torch.allclose(new[:, kept], exact, atol=1e-3)
    assert float(new.abs().sum()) == float(new[:, kept].abs().sum())
    left = (hidden @ (new - old).t()).norm() / (hidden @ old.t()).norm()
    assert abs(errors[module.output.name] - float(left)) < 1e-4
