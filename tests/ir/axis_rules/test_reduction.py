"""Rules of reductions: an averaged class is tagged, one that is selected from is pinned, the others go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxpress.ir.program import Program

from ...masking import assert_case, between_convs, between_linears

aten = torch.ops.aten


def linears(function: Callable[[Tensor], Tensor], out: int = 12) -> Callable[[], Program]:
    return lambda: between_linears(function, out=out)


def first(function: Callable[[Tensor], Tensor]) -> Callable[[], Program]:
    """The function's result, of one number a position, added to what it was made of."""
    return linears(lambda x: x + function(x))


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.mean", linears(lambda x: x.mean(1)), "first.weight[0]"),
    ("aten.mean", lambda: between_convs(lambda x: x.mean((-1, -2), keepdim=True)), "first.weight[0]"),
    ("aten.mean", first(lambda x: x.mean(-1, keepdim=True)), "first.weight[0]~"),
    ("aten.sum", first(lambda x: x.sum(-1, keepdim=True)), "first.weight[0]~"),
    ("aten.sum", linears(lambda x: x.sum(-2)), "first.weight[0]"),
    ("aten.sum", first(lambda x: x.sum()), "first.weight[0]~"),
    ("aten.nansum", first(lambda x: x.nansum(-1, keepdim=True)), "first.weight[0]~"),
    ("aten.var", first(lambda x: x.var(1, keepdim=True)), "first.weight[0]"),
    ("aten.std", first(lambda x: x.std(-1, keepdim=True)), "first.weight[0]~"),
    ("aten.var_mean", first(lambda x: torch.var_mean(x, -1, keepdim=True)[1]), "first.weight[0]~"),
    ("aten.std_mean", first(lambda x: torch.std_mean(x, 1, keepdim=True)[0]), "first.weight[0]"),
    ("aten.linalg_vector_norm", first(lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True)), "first.weight[0]~"),
    ("aten.norm", first(lambda x: aten.norm.ScalarOpt_dim(x, 2, [-1], True)), "first.weight[0]~"),
    ("aten.amax", first(lambda x: x.amax(-1, keepdim=True)), ""),
    ("aten.amax", first(lambda x: x.amax(1, keepdim=True)), "first.weight[0]"),
    ("aten.amin", first(lambda x: x.amin(0)), "first.weight[0]"),
    ("aten.max", first(lambda x: x.max(-1, keepdim=True)[0]), ""),
    ("aten.max", first(lambda x: x.max()), ""),
    ("aten.max", linears(lambda x: aten.max.other(x, x.tanh())), "first.weight[0]"),
    ("aten.min", first(lambda x: x.min(1, keepdim=True)[0]), "first.weight[0]"),
    ("aten.prod", first(lambda x: x.prod(-1, keepdim=True)), ""),
    ("aten.any", first(lambda x: (x > 0).any(1, keepdim=True)), "first.weight[0]"),
    ("aten.all", first(lambda x: (x > 0).all(-1, keepdim=True)), ""),
    ("aten.logsumexp", first(lambda x: x.logsumexp(-1, keepdim=True)), ""),
    ("aten.argmax", first(lambda x: x.argmax(1, keepdim=True)), "first.weight[0]"),
    ("aten.argmin", first(lambda x: x.argmin(-1, keepdim=True)), ""),
    ("aten.median", first(lambda x: x.median(1, keepdim=True)[0]), "first.weight[0]"),
    ("aten.kthvalue", linears(lambda x: x.kthvalue(2, 1)[0]), "first.weight[0]"),
    ("aten.mode", linears(lambda x: x.mode(1)[0]), "first.weight[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)
