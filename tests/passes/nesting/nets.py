"""Nested tiny models, made once a session."""

from __future__ import annotations

from functools import cache

import fxpress
from fxpress.ir.program import Program
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context

from ...tiny import fresh_program
from ..test_decompose_modules import data


@cache
def _nested(name: str) -> tuple[Program, Context]:
    program = fxpress.optimize(fresh_program(name), "nest{centre=true}", calibration=data(name)).program
    return program, Context(calibration=as_calls(data(name), program.inputs))


def nested(name: str) -> tuple[Program, Context]:
    """A nested program, free to edit, and a context with its calibration calls."""
    program, ctx = _nested(name)
    return program.clone(), Context(calibration=ctx.calibration)
