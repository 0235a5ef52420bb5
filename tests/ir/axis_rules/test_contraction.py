"""Rules of products: contracted axes join, attention keeps its heads apart, compressed weights are pinned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.ir.axes import analyze_axes
from fxpress.ir.formats.affine import Affine
from fxpress.ir.program import Program

from ...checks import compress
from ...masking import assert_case, captured_double, free, sandwich
from ...tiny import fresh_program, randn

aten = torch.ops.aten
Product = Callable[[Tensor, Tensor], Tensor]


class Pair(nn.Module):
    """A function of two projections `[2, 3, 6]` of one input, projected to 2."""

    def __init__(self, function: Product, out: int) -> None:
        super().__init__()
        self.function, self.a, self.b, self.o = function, nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.function(self.a(x), self.b(x)))


class Stored(nn.Module):
    """A function of the input and a stored matrix `[5, 6]` and vector `[6]`, projected to 2."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.o = function, nn.Linear(6, 2)
        self.m, self.v = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.function(x, self.m, self.v))


class Attention(nn.Module):
    """Scaled dot-product attention of 4 query heads of 6 (values of 5) over `groups` key heads."""

    def __init__(self, groups: int = 4, **options: bool | float) -> None:
        super().__init__()
        self.options, self.groups = options, groups
        self.q, self.k, self.v, self.o = nn.Linear(7, 24), nn.Linear(7, 6 * groups), nn.Linear(7, 5 * groups), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (heads, -1)).transpose(1, 2) for m, heads in ((self.q, 4), (self.k, self.groups), (self.v, self.groups)))
        out = F.scaled_dot_product_attention(q, k, v, **self.options)  # type: ignore[arg-type]
        return self.o(out.transpose(1, 2).flatten(2))


class Queries(nn.Module):
    """Stored queries over the input, every result weighted: one can be removed unless they are causal."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.queries, self.o = causal, nn.Parameter(torch.ones(4, 6)), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(2, 4, 6)
        return self.o(F.scaled_dot_product_attention(queries, x, x, is_causal=self.causal).flatten(1))


def flash(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 6)).transpose(1, 2)
    return aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q)[0].transpose(1, 2).flatten(2)


def pair(function: Product, out: int) -> Callable[[], Program]:
    return lambda: captured_double(Pair(function, out), randn(2, 3, 5))


def stored(function: Callable[[Tensor, Tensor, Tensor], Tensor], *shape: int) -> Callable[[], Program]:
    return lambda: captured_double(Stored(function), randn(*shape))


def attention(groups: int = 4, **options: bool | float) -> Callable[[], Program]:
    return lambda: captured_double(Attention(groups, **options), randn(2, 5, 7))


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.linear", lambda: sandwich(nn.Linear(6, 8), nn.Linear(8, 10, bias=False), nn.Linear(10, 4), randn(2, 6)), "first.weight[0] middle.weight[0]"),
    ("aten.linear", lambda: sandwich(nn.Flatten(0), nn.Linear(12, 10), nn.Linear(10, 4), randn(3, 4)), "middle.weight[0]"),
    ("aten.addmm", stored(lambda x, m, v: torch.addmm(v, x, m), 3, 5), "m[1]"),
    ("aten.addmm", stored(lambda x, m, v: torch.addmm(v, x, m, beta=0.5, alpha=2), 3, 5), "m[1]"),
    ("aten.mm", stored(lambda x, m, v: torch.mm(x, m), 3, 5), "m[1]"),
    ("aten.mm", stored(lambda x, m, v: torch.mm(x, (m @ m.t()) @ m), 3, 5), "m[1]"),
    ("aten.matmul", stored(lambda x, m, v: x @ m * (x @ m @ v).unsqueeze(-1), 2, 3, 5), "m[1]"),
    ("aten.bmm", pair(lambda a, b: torch.bmm(a, b.transpose(1, 2)), 3), "a.weight[0]"),
    ("aten.bmm", pair(lambda a, b: torch.bmm(a.sigmoid(), b.transpose(1, 2)), 3), "a.weight[0]"),
    ("aten.bmm", pair(lambda a, b: torch.bmm(a.sigmoid(), b.exp().transpose(1, 2)), 3), "a.weight[0]~"),
    ("aten.bmm", pair(lambda a, b: torch.bmm(a.cos() + 1, (b - 2).transpose(1, 2)), 3), "a.weight[0]~"),
    ("aten.baddbmm", pair(lambda a, b: torch.baddbmm(a, torch.bmm(a, a.transpose(1, 2)), b), 6), "a.weight[0]"),
    ("aten.matmul", pair(lambda a, b: a.transpose(1, 2) @ b, 6), "b.weight[0]"),
    ("aten.matmul", pair(lambda a, b: (a.unsqueeze(-1) @ b.unsqueeze(-2)).flatten(-2), 36), "a.weight[0] b.weight[0]"),
    ("aten.matmul", pair(lambda a, b: (a.unsqueeze(-1) @ a.unsqueeze(-2)).flatten(-2), 36), ""),
    ("aten.einsum", pair(lambda a, b: torch.einsum("btc,bsc->bts", a, b), 3), "a.weight[0]"),
    ("aten.einsum", pair(lambda a, b: torch.einsum("btc,bsc->bts", a.exp(), b.exp()), 3), "a.weight[0]~"),
    ("aten.einsum", pair(lambda a, b: torch.einsum("btc,btd->btcd", a, b).flatten(2), 36), "a.weight[0] b.weight[0]"),
    ("aten.einsum", pair(lambda a, b: torch.einsum("btc,btd->bcd", a, b), 6), "b.weight[0]"),
    ("aten.einsum", pair(lambda a, b: torch.einsum("btc->bt", a.sigmoid()).unsqueeze(-1) * b, 6), "a.weight[0]~ b.weight[0]"),
    ("aten.einsum", pair(lambda a, b: torch.einsum("...c,...c->...c", a, b), 6), "!aten.einsum"),
    ("aten.scaled_dot_product_attention", attention(), "q.weight[0].0 q.weight[0].1 v.weight[0].1"),
    ("aten.scaled_dot_product_attention", attention(is_causal=True), "q.weight[0].0 q.weight[0].1 v.weight[0].1"),
    ("aten.scaled_dot_product_attention", attention(scale=0.7), "q.weight[0].0 q.weight[0].1 v.weight[0].1"),
    ("aten.scaled_dot_product_attention", attention(2, enable_gqa=True), "q.weight[0].0 q.weight[0].1 q.weight[0].2 v.weight[0].1"),
    ("aten.scaled_dot_product_attention", attention(1, enable_gqa=True), "q.weight[0].0 q.weight[0].1 v.weight[0]"),
    ("aten.scaled_dot_product_attention", lambda: captured_double(Queries(False), randn(2, 5, 6)), "queries[0]"),
    ("aten.scaled_dot_product_attention", lambda: captured_double(Queries(True), randn(2, 5, 6)), ""),
    ("aten._scaled_dot_product_flash_attention_for_cpu", lambda: sandwich(nn.Linear(6, 12), flash, nn.Linear(12, 4), randn(2, 3, 6)),
     "first.weight[0].0 first.weight[0].1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)


COMPRESSED = {  # model, site, what stays free elsewhere
    "fxpress.linear": ("mlp", "up", []),
    "fxpress.conv": ("conv", "conv2", []),
    "fxpress.embedding": ("embedding", "embed", ["mix.weight[0]"]),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_site_pins_what_it_contracts_and_makes(name: str) -> None:
    model, site, others = COMPRESSED[name]
    program = fresh_program(model)
    compress(program, next(s for s in program.sites() if s.name == site), Affine(bits=8))
    analysis = analyze_axes(program)
    assert not analysis.unruled
    assert [c.name for c in free(analysis)] == others
    assert any("prune before quantizing" in c.pinned[0] for c in analysis.classes if c.pinned)
