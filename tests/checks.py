"""Assertions and small steps shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxpress.ir.edit import Editor
from fxpress.ir.formats.base import WeightFormat
from fxpress.ir.program import Program
from fxpress.ir.sites import WeightSite


def assert_same(got: Any, expected: Any) -> None:
    """Two pytrees of one structure, their tensors bit-equal."""
    left, structure = pytree.tree_flatten(got)
    right, wanted = pytree.tree_flatten(expected)
    assert structure == wanted
    for a, b in zip(left, right, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def relative_error(got: Tensor, expected: Tensor) -> float:
    """`|got - expected| / |expected|` in Frobenius norms, in double precision."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def assert_closer(reference: Tensor, candidate: Tensor, competitor: Tensor, *, slack: float = 2.0) -> None:
    """`candidate` is at most `slack` times as far from the double-precision `reference` as `competitor`, or within 1e-6 of it."""
    ours, theirs = relative_error(candidate, reference), relative_error(competitor, reference)
    assert ours <= max(slack * theirs, 1e-6), f"relative error {ours:.3g}, competitor {theirs:.3g}"


def compress(program: Program, site: WeightSite, fmt: WeightFormat) -> None:
    """Store the site's weight in `fmt`, rounded to nearest."""
    with Editor(program, "test") as editor:
        editor.compress(site, fmt, fmt.encode(site.matrix()), "why")
