"""Recipes at equal multiply-adds: the largest ratio with which a recipe leaves no more than a share of them."""

from __future__ import annotations

from fxpress.ir.axes import analyze_axes
from fxpress.ir.program import Program
from fxpress.passes.context import Context
from fxpress.passes.recipe import as_recipe


def planned_macs(dense: Program, spec: str) -> int:
    """Multiply-adds after the passes of `spec` (with ` -> ` between them), without their data."""
    clone, ctx = dense.clone(), Context()
    for one in as_recipe(spec.split(" -> ")).passes:
        one.preview(clone, one.analyze(clone, ctx), ctx)
    return analyze_axes(clone).macs()


def fitting_spec(dense: Program, spec: str, share: float | None) -> str:
    """`spec` with the largest ratio for its `%s` that leaves `share` of the multiply-adds; None: as it is."""
    if share is None:
        return spec
    goal, low, high = share * analyze_axes(dense).macs(), 0.0, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if planned_macs(dense, spec % f"{middle:.5f}") <= goal else (low, middle)
    return spec % f"{low:.5f}"
