"""Rules of element-wise operators and of those that hand axes on: which classes stay free, and that removing is masking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.ir.axes import analyze_axes
from fxpress.ir.program import Program

from ...masking import assert_case, between_convs, between_linears, captured_double
from ...tiny import randn

aten = torch.ops.aten


class Buffered(nn.Module):
    """Constants that broadcast along the channels, by a function of both."""

    constant: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], constant: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)


def linears(function: Callable[[Tensor], Tensor]) -> Callable[[], Program]:
    return lambda: between_linears(function)


def constant(function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Callable[[], Program]:
    return lambda: between_linears(Buffered(function, randn(*shape)))


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.sigmoid", linears(torch.sigmoid), "first.weight[0]"),
    ("aten.exp", linears(torch.exp), "first.weight[0]"),
    ("aten.mul", constant(torch.mul, 12), "first.weight[0]"),
    ("aten.add", constant(torch.add, 3, 1), "first.weight[0]"),
    ("aten.add", constant(torch.add, 3, 12), "first.weight[0]"),
    ("aten.where", constant(lambda x, c: torch.where(c > 0, x, c), 12), "first.weight[0]"),
    ("aten.where", constant(lambda x, c: torch.where(x > 0, x, 1.0), 12), "first.weight[0]"),
    ("aten.masked_fill", constant(lambda x, c: x.masked_fill(c > 0, 2.0), 1, 12), "first.weight[0]"),
    ("aten.lerp", linears(lambda x: torch.lerp(x, x.relu(), 0.5)), "first.weight[0]"),
    ("aten.addcmul", linears(lambda x: torch.addcmul(x, x, x)), "first.weight[0]"),
    ("aten.addcdiv", linears(lambda x: torch.addcdiv(x, x, x.exp())), "first.weight[0]"),
    ("aten.clamp", linears(lambda x: x.clamp(0.1, 2)), "first.weight[0]"),
    ("aten.hardtanh", linears(F.hardtanh), "first.weight[0]"),
    ("aten.hardswish", linears(F.hardswish), "first.weight[0]"),
    ("aten.hardsigmoid", linears(F.hardsigmoid), "first.weight[0]"),
    ("aten.relu6", linears(aten.relu6.default), "first.weight[0]"),
    ("aten.__and__", linears(lambda x: x * ((x > 0) & (x < 1))), "first.weight[0]"),
    ("aten.__and__", linears(lambda x: x * aten.__and__.Tensor(x > 0, x < 1)), "first.weight[0]"),
    ("aten.__or__", linears(lambda x: x * aten.__or__.Tensor(x > 0, x < -1)), "first.weight[0]"),
    ("aten.clone", linears(lambda x: x.clone()), "first.weight[0]"),
    ("aten.alias", linears(lambda x: aten.alias.default(x)), "first.weight[0]"),
    ("aten.detach", linears(lambda x: x.detach()), "first.weight[0]"),
    ("aten._to_copy", linears(lambda x: x.to(torch.float64).to(x.dtype)), "first.weight[0]"),
    ("aten.zeros_like", linears(lambda x: torch.maximum(x, torch.zeros_like(x))), "first.weight[0]"),
    ("aten.ones_like", linears(lambda x: x + torch.ones_like(x)), "first.weight[0]"),
    ("aten.full_like", linears(lambda x: x + torch.full_like(x, 2)), "first.weight[0]"),
    ("aten.empty_like", linears(lambda x: torch.where(torch.empty_like(x) > 0, x, x)), "first.weight[0]"),
    ("aten.rand_like", linears(lambda x: x + torch.rand_like(x) * 0), "first.weight[0]"),
    ("aten.randn_like", linears(lambda x: x + torch.randn_like(x) * 0), "first.weight[0]"),
    ("aten.bernoulli", linears(lambda x: x + aten.bernoulli.default(x.sigmoid() * 0)), "first.weight[0]"),
    ("aten.fill", linears(lambda x: x + aten.fill.Scalar(x, 3)), "first.weight[0]"),
    ("aten.type_as", linears(lambda x: aten.type_as.default(x, torch.ones(5, dtype=x.dtype))), "first.weight[0]"),
    ("aten.softmax", linears(lambda x: x.softmax(-1)), ""),
    ("aten.softmax", linears(lambda x: x.softmax(1)), "first.weight[0]"),
    ("aten._softmax", linears(lambda x: aten._softmax.default(x, 1, False)), "first.weight[0]"),
    ("aten.log_softmax", linears(lambda x: x.log_softmax(-1)), ""),
    ("aten._log_softmax", linears(lambda x: aten._log_softmax.default(x, 1, False)), "first.weight[0]"),
    ("aten._safe_softmax", linears(lambda x: aten._safe_softmax.default(x, 1)), "first.weight[0]"),
    ("aten.cumsum", linears(lambda x: x.cumsum(-1)), ""),
    ("aten.cumsum", linears(lambda x: x.cumsum(-2)), "first.weight[0]"),
    ("aten.cumprod", linears(lambda x: x.cumprod(2)), ""),
    ("aten.logcumsumexp", linears(lambda x: x.logcumsumexp(1)), "first.weight[0]"),
    ("aten.cummax", linears(lambda x: x.cummax(1)[0]), "first.weight[0]"),
    ("aten.flip", linears(lambda x: x.flip(-1)), ""),
    ("aten.flip", linears(lambda x: x.flip(0, 1)), "first.weight[0]"),
    ("aten.roll", linears(lambda x: x.roll(1, 1)), "first.weight[0]"),
    ("aten.roll", linears(lambda x: x.roll(1)), ""),
    ("aten.sort", linears(lambda x: x.sort(-1)[0]), ""),
    ("aten.sort", linears(lambda x: x.sort(1)[0]), "first.weight[0]"),
    ("aten.argsort", linears(lambda x: x + 0 * aten.argsort.default(x, 1)), "first.weight[0]"),
    ("aten.tril", linears(lambda x: x.tril()), ""),
    ("aten.triu", linears(lambda x: x.transpose(0, 2).triu().transpose(0, 2)), "first.weight[0]"),
    ("aten.glu", lambda: between_linears(lambda x: F.glu(x, -1), 12, 6), "first.weight[0]"),
    ("aten.glu", lambda: between_convs(lambda x: F.glu(x, 1), 8, 4), "first.weight[0]"),
    ("aten.prelu", lambda: between_convs(nn.PReLU(8)), "first.weight[0]"),
    ("aten.prelu", lambda: between_convs(nn.PReLU(1)), "first.weight[0]"),
    ("aten._prelu_kernel", lambda: between_convs(Buffered(aten._prelu_kernel.default, randn(8, 1, 1))), "first.weight[0]"),
    ("getitem", lambda: between_linears(lambda x: sum(x.split(4, -1)), out=4), "first.weight[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)


def test_a_scalar_and_a_broadcast_constant_do_not_join_classes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(2 * self.a(x) + self.b(x))

    text = analyze_axes(captured_double(Two(), randn(2, 3))).to_text()
    assert "a.weight[0] (4): a.weight[0], a.bias[0], c.weight[1]" in text


def test_a_gate_that_is_not_zero_at_zero_is_tagged_only_where_it_is_summed() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.o((F.elu(self.q(x)) + 1) @ (F.elu(self.k(x)) + 1).transpose(-1, -2))

    (one,) = (c for c in analyze_axes(captured_double(Scores(), randn(2, 3, 5))).classes if not c.pinned)
    assert one.name == "q.weight[0]"
    assert one.reductions == ("matmul",)
