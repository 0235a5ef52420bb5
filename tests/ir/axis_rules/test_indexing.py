"""Rules of operators that pick by number: what they pick from is pinned, the other axes go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.ir.program import Program

from ...masking import assert_case, between_linears, captured_double
from ...tiny import tokens

aten = torch.ops.aten


def linears(function: Callable[[Tensor], Tensor], out: int = 12) -> Callable[[], Program]:
    return lambda: between_linears(function, out=out)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def embedded() -> Program:
    return captured_double(nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3)), tokens(2, 4, 10))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bag(x))


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.embedding", embedded, "0.weight[1]"),
    ("aten.index_select", linears(lambda x: x.index_select(1, ids(2, 0, 0))), "first.weight[0]"),
    ("aten.index_select", linears(lambda x: x.index_select(-1, ids(2, 0, 1)), 3), ""),
    ("aten.gather", linears(lambda x: x.gather(1, ids(0, 2).view(1, 2, 1).expand(2, 2, 12))), "first.weight[0]"),
    ("aten.gather", linears(lambda x: x.gather(-1, ids(0, 2).expand(2, 3, 2)), 2), ""),
    ("aten.take_along_dim", linears(lambda x: aten.take_along_dim.default(x, ids(0, 2).view(1, 2, 1).expand(2, 2, 12), 1)), "first.weight[0]"),
    ("aten.index", linears(lambda x: x[:, ids(0, 2)]), "first.weight[0]"),
    ("aten.index", linears(lambda x: x[..., ids(0, 2)], 2), ""),
    ("aten.index", linears(lambda x: x[ids(0, 1), ids(2, 1)]), "first.weight[0]"),
    ("aten.one_hot", linears(lambda x: x + F.one_hot(ids(1, 2, 0), 12)), ""),
    ("aten.topk", linears(lambda x: x.topk(2, 1)[0]), "first.weight[0]"),
    ("aten.topk", linears(lambda x: x.topk(2, -1)[0], 2), ""),
    ("aten.embedding_bag", lambda: captured_double(Bag(), tokens(2, 4, 10)), "!aten.embedding_bag.padding_idx"),
    ("aten.scatter", linears(lambda x: x.scatter(1, ids(0, 2).view(1, 2, 1).expand(2, 2, 12), 0.5)), "!aten.scatter.value"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)


def test_rows_of_an_embedding_are_pinned() -> None:
    from fxpress.ir.axes import analyze_axes

    assert analyze_axes(embedded()).class_named("0.weight[0]").pinned == ("rows of embedding are ids",)
