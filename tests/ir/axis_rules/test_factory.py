"""Rules of operators that make tensors: their sizes follow the classes, numbered positions are pinned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxpress.ir.program import Program

from ...masking import assert_case, between_linears

aten = torch.ops.aten


def linears(function: Callable[[Tensor], Tensor]) -> Callable[[], Program]:
    return lambda: between_linears(function)


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.zeros", linears(lambda x: x + aten.zeros.default([12])), "first.weight[0]"),
    ("aten.ones", linears(lambda x: x + aten.ones.default([3, 12])), "first.weight[0]"),
    ("aten.full", linears(lambda x: x + aten.full.default([12], 2.0)), "first.weight[0]"),
    ("aten.empty", linears(lambda x: torch.where(aten.empty.memory_format([12]) > 0, x, x)), "first.weight[0]"),
    ("aten.rand", linears(lambda x: x + 0 * aten.rand.default([12])), "first.weight[0]"),
    ("aten.randn", linears(lambda x: x + 0 * aten.randn.default([12])), "first.weight[0]"),
    ("aten.new_zeros", linears(lambda x: x + x.new_zeros(12)), "first.weight[0]"),
    ("aten.new_ones", linears(lambda x: x + x.new_ones(3, 12)), "first.weight[0]"),
    ("aten.new_full", linears(lambda x: x + x.new_full((12,), 3.0)), "first.weight[0]"),
    ("aten.new_empty", linears(lambda x: torch.where(aten.new_empty.default(x, [12]) > 0, x, x)), "first.weight[0]"),
    ("aten.arange", linears(lambda x: x + torch.arange(12, dtype=x.dtype)), ""),
    ("aten.linspace", linears(lambda x: x + torch.linspace(0, 1, 12)), ""),
    ("aten.eye", linears(lambda x: x @ torch.eye(12, dtype=x.dtype)), ""),
    ("aten.scalar_tensor", linears(lambda x: x + aten.scalar_tensor.default(2.0)), "first.weight[0]"),
    ("aten.randperm", linears(lambda x: x + 0 * torch.randperm(12)), ""),
    ("aten.randint", linears(lambda x: x + 0 * torch.randint(3, (12,))), ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)
