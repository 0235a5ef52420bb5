"""Example inputs, their structure, and dynamic axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.ir.capture import capture
from fxpress.ir.errors import CaptureError
from fxpress.ir.inputs import DynamicAxis, Inputs, as_inputs

from ..tiny import randn


class Pair(nn.Module):
    """`a @ weight + b`, with options that end up as constants."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor, *, scale: float = 1.0, extra: Any = None) -> Tensor:
        """`[N, 4], [M, 4] -> [N, 4]` (M is 1 or N)."""
        return self.linear(a) * scale + b.sum() + (0 if extra is None else extra)


A, B = randn(2, 4), randn(3, 4, seed=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(A, ((A,), {})), ([A, B], ((A, B), {})), ((A,), ((A,), {})), ({"a": A}, ((), {"a": A}))],
)
def test_as_inputs(given: Any, expected: Any) -> None:
    args, kwargs = as_inputs(given)
    assert [id(x) for x in args] == [id(x) for x in expected[0]]
    assert kwargs.keys() == expected[1].keys()


def test_as_inputs_refuses_other_types() -> None:
    with pytest.raises(CaptureError, match="expected a tensor, a tuple or a dict of keyword inputs, got int"):
        as_inputs(3)


def test_flatten_follows_the_order_of_the_examples() -> None:
    inputs = Inputs((), {"b": B, "a": {"x": A}})
    leaves = inputs.flatten((), {"a": {"x": A}, "b": B})
    assert [id(x) for x in leaves] == [id(x) for x in inputs.leaves] == [id(B), id(A)]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"b": B}, "expected 1 positional"),
        (([A],), {}, r"keywords \['b'\], got 1 positional and keywords \[\]"),
        (({"x": A},), {"b": B}, "expected structure"),
    ],
)
def test_flatten_refuses_another_structure(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inputs(([A],), {"b": B}).flatten(args, kwargs)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ([A, 1.0, None], None),
        ([randn(7, 4), 1.0, None], None),
        ([randn(7, 5), 1.0, None], r"input 0: expected shape \[\*, 4\]"),
        ([randn(2), 1.0, None], "input 0: expected shape"),
        ([A.double(), 1.0, None], "input 0: expected dtype torch.float32, got torch.float64"),
        ([3, 1.0, None], "input 0: expected a tensor, got int"),
        ([A, 2.0, None], "input 1: expected the captured constant 1.0, got 2.0"),
        ([A, A, None], "input 1: expected the captured constant 1.0, got a tensor"),
        ([A, 1.0, A], "input 2: expected the captured constant None, got a tensor"),
    ],
)
def test_why_mismatch(leaves: list[Any], message: str | None) -> None:
    inputs = Inputs((A, 1.0, None), {}, ({0: DynamicAxis("n")}, {}, {}))
    why = inputs.why_mismatch(leaves)
    if message is None:
        assert why is None
    else:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(why)


N, M = Dim("rows", min=1, max=9), Dim("others", min=2, max=7)


@pytest.mark.parametrize(
    ("inputs", "shapes", "axes"),
    [
        ((A, B), ({0: N}, {0: M}), (0, 1)),
        ((A, B), {"a": {0: N}, "b": {0: M}}, (0, 1)),
        ((A, B), ((N, None), {0: M}), (0, 1)),
        ({"a": A, "b": B}, {"b": {0: M}, "a": {0: N}}, (0, 1)),
        ({"b": B, "a": A}, {"a": {0: N}, "b": {0: M}}, (1, 0)),
    ],
)
def test_dynamic_axes_keep_the_users_names_and_ranges(inputs: Any, shapes: Any, axes: tuple[int, int]) -> None:
    program = capture(Pair(), inputs, dynamic_shapes=shapes)
    rows, others = axes
    assert program.inputs.dynamic[rows] == {0: DynamicAxis("rows", 1, 9)}
    assert program.inputs.dynamic[others] == {0: DynamicAxis("others", 2, 7)}


def test_one_dim_on_two_inputs_is_one_axis() -> None:
    program = capture(Pair(), (A, A), dynamic_shapes=({0: N}, {0: N}))
    assert program.inputs.dynamic == ({0: DynamicAxis("rows", 1, 9)},) * 2


def test_open_ranges_and_automatic_dims() -> None:
    program = capture(Pair(), (A, B), dynamic_shapes=({0: Dim("rows", min=0)}, {0: Dim.DYNAMIC}))
    assert program.inputs.dynamic[0] == {0: DynamicAxis("rows", 1, None)}
    assert set(program.inputs.dynamic[1]) == {0}


def test_re_export_keeps_dynamic_axes() -> None:
    program = capture(Pair(), (A, B), dynamic_shapes=({0: N}, {0: M}))
    again = capture(program.to_exported())
    assert [{a: (d.low, d.high) for a, d in axes.items()} for axes in again.inputs.dynamic] == [{0: (1, 9)}, {0: (2, 7)}]
    inputs = (randn(5, 4), randn(6, 4))
    torch.testing.assert_close(again.run(*inputs), program.run(*inputs), rtol=0, atol=0)


def test_derived_dims_are_refused() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            """`[2n, 4], [n, 4] -> [n, 4]`."""
            return x[::2] + y

    with pytest.raises(CaptureError, match="only independent dynamic axes and their sums are supported"):
        capture(Halves(), (randn(8, 4), randn(4, 4)), dynamic_shapes=({0: 2 * N}, {0: N}))
