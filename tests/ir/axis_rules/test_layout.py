"""Rules of views, permutations, cuts and joins: classes are followed through products and concatenations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.axes import analyze_axes
from fxpress.ir.program import Program

from ...masking import assert_case, between_convs, between_linears, captured_double, difference, double, names_of_ops, outputs, resized, sandwich
from ...tiny import fresh_program, randn

aten = torch.ops.aten


class Skip(nn.Module):
    """Three branches joined along the channels, then cut again in other places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = (nn.Conv2d(3, n, 1) for n in (4, 6, 2, 4))
        self.o = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x), self.b(x), self.c(x)], -3)
        left, right = joined.split([5, 7], 1)
        return self.o(torch.cat([right, left], 1))


class FusedQkv(nn.Module):
    """One projection to `[3, 2 heads, 4]`, taken apart by a function."""

    def __init__(self, apart: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.apart, self.qkv, self.o = apart, nn.Linear(6, 24), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.apart(self.qkv(x).view(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4))
        return self.o((torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v).transpose(1, 2).reshape(2, 3, 8))


def linears(middle: Callable[[Tensor], Tensor], out: int = 12) -> Callable[[], Program]:
    return lambda: between_linears(middle, 12, out)


def convs(middle: Callable[[Tensor], Tensor], hidden: int = 8, out: int = 8) -> Callable[[], Program]:
    return lambda: between_convs(middle, hidden, out)


def flat() -> Program:
    return sandwich(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 4), randn(2, 3, 6, 6))


def fused(apart: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[], Program]:
    return lambda: captured_double(FusedQkv(apart), randn(2, 3, 6))


def uneven(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, -1)
    return torch.cat([c, a * 2, b.tanh()], -1)


def shared_and_own(x: Tensor) -> Tensor:
    a, b = x.split([4, 8], -1)
    return torch.cat([a * a, b[..., :4] + b[..., 4:]], -1)


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.view", flat, "first.weight[0]"),
    ("aten.view", linears(lambda x: x.view(2, 3, 4, 3).transpose(2, 3).tanh().flatten(2)), "first.weight[0].0 first.weight[0].1"),
    ("aten.view", linears(lambda x: x.view(2, -1).view(2, 3, -1)), "first.weight[0]"),
    ("aten.view", linears(lambda x: x.view(6, 12, 1).view(2, 3, 1, 12).squeeze(2)), "first.weight[0]"),
    ("aten.view", linears(lambda x: x.view(2, 3, 2, 6)[:, :, 0], 6), "first.weight[0].1"),
    ("aten._unsafe_view", linears(lambda x: aten._unsafe_view.default(x, [6, 12])), "first.weight[0]"),
    ("aten.view_copy", linears(lambda x: aten.view_copy.default(x, [6, 12])), "first.weight[0]"),
    ("aten.expand", linears(lambda x: x[:, :1].expand(2, 5, 12)), "first.weight[0]"),
    ("aten.expand", linears(lambda x: x.mean(-1, keepdim=True).expand(-1, -1, 7), 7), "first.weight[0]~ last.weight[1]"),
    ("aten.expand", linears(lambda x: x.unsqueeze(-2).expand(2, 3, 2, 12).flatten(2), 24), "first.weight[0] last.weight[1].0"),
    ("aten.expand_copy", linears(lambda x: aten.expand_copy.default(x, [4, 2, 3, 12])), "first.weight[0]"),
    ("aten.repeat", linears(lambda x: x.repeat(1, 1, 2), 24), "first.weight[0] last.weight[1].0"),
    ("aten.repeat", linears(lambda x: x.repeat(2, 1, 1, 1)), "first.weight[0]"),
    ("aten.repeat_interleave", linears(lambda x: x.repeat_interleave(3, -1), 36), "first.weight[0] last.weight[1].1"),
    ("aten.permute", linears(lambda x: x.permute(1, 0, -1)), "first.weight[0]"),
    ("aten.permute_copy", linears(lambda x: aten.permute_copy.default(x, [1, 0, 2])), "first.weight[0]"),
    ("aten.transpose", linears(lambda x: x.transpose(-1, 0).transpose(0, -1)), "first.weight[0]"),
    ("aten.t", linears(lambda x: x[0].t().t()), "first.weight[0]"),
    ("aten.unsqueeze", linears(lambda x: x.unsqueeze(-1).unsqueeze(0).squeeze(-1)), "first.weight[0]"),
    ("aten.squeeze", linears(lambda x: x[:, :1].squeeze(1)), "first.weight[0]"),
    ("aten.squeeze", linears(lambda x: x[:, :1].squeeze()), "first.weight[0]"),
    ("aten.select", linears(lambda x: x[:, 0]), "first.weight[0]"),
    ("aten.select", linears(lambda x: x[..., 0].unsqueeze(-1) * x), ""),
    ("aten.select", fused(lambda x: (x[0], x[1], x[2])), "qkv.weight[0].1 qkv.weight[0].2"),
    ("aten.unbind", fused(lambda x: x.unbind(0)), "qkv.weight[0].1 qkv.weight[0].2"),
    ("aten.slice", linears(lambda x: x[..., 2:-3], 7), "first.weight[0].0 first.weight[0].1 first.weight[0].2"),
    ("aten.slice", linears(lambda x: x[..., -5:], 5), "first.weight[0].0 first.weight[0].1"),
    ("aten.slice", linears(lambda x: x[..., ::2], 6), ""),
    ("aten.slice", linears(lambda x: torch.cat([-x[..., 6:], x[..., :6]], -1) + x), "first.weight[0]"),
    ("aten.slice", linears(lambda x: x[..., 1:] + x[..., :-1], 11), ""),
    ("aten.slice", linears(lambda x: x[..., 4:8] * x[..., 5:9], 4), "first.weight[0].0 first.weight[0].1"),
    ("aten.slice", linears(lambda x: x.narrow(-1, 2, 6), 6), "first.weight[0].0 first.weight[0].1 first.weight[0].2"),
    ("aten.split_with_sizes", linears(shared_and_own, 8), "first.weight[0].0 first.weight[0].1"),
    ("aten.split", linears(lambda x: x.split(6, -1)[1], 6), "first.weight[0].0 first.weight[0].1"),
    ("aten.split", linears(uneven), "first.weight[0].0 first.weight[0].1 first.weight[0].2"),
    ("aten.split", linears(lambda x: torch.cat(x.view(2, 3, 2, 6).split(3, -1)[::-1], -1).flatten(2)), "first.weight[0].0 first.weight[0].1 first.weight[0].2"),
    ("aten.split_with_sizes", linears(lambda x: x.split([3, 4, 5], -1)[1], 4), "first.weight[0].0 first.weight[0].1 first.weight[0].2"),
    ("aten.split_copy", linears(lambda x: aten.split_copy.Tensor(x, 6, -1)[0], 6), "first.weight[0].0 first.weight[0].1"),
    ("aten.cat", lambda: captured_double(Skip(), randn(2, 3, 4, 4)), "a.weight[0] b.weight[0] c.weight[0]"),
    ("aten.cat", linears(lambda x: torch.cat([x[..., :0], x], -1) + x), ""),
    ("aten.cat", linears(lambda x: torch.cat([x, x.mean(-1, keepdim=True)], -1), 13), "first.weight[0]~"),
    ("aten.cat", linears(lambda x: torch.cat([x, x.relu()], 1)), "first.weight[0]"),
    ("aten.concat", linears(lambda x: aten.concat.default([x, x.tanh()], -1), 24), "first.weight[0]"),
    ("aten.stack", linears(lambda x: torch.stack([x, x.tanh()], -1).flatten(-2), 24), "first.weight[0]"),
    ("aten.stack", linears(lambda x: torch.stack([x, x.tanh()], 0)), "first.weight[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)


def test_a_reshape_left_by_a_resize_has_a_rule() -> None:
    """Views of transposed attention outputs become `aten.reshape` when heads get narrower."""
    program = double(fresh_program("llama"))
    once = resized(program, {"model.layers.0.self_attn.v_proj.weight[0].1": [7, 0, 1, 2, 3]})
    assert "aten.reshape" in names_of_ops(once)
    assert not analyze_axes(once).unruled
    other = resized(once, {"model.layers.1.self_attn.v_proj.weight[0].1": range(8)})
    assert difference(outputs(other), outputs(once)) < 1e-12
    narrow = resized(program, {"model.layers.0.mlp.gate_proj.weight[0]": range(40)})
    assert "aten.reshape" not in names_of_ops(narrow)


def test_columns_of_a_flattened_image_are_channels_times_pixels() -> None:
    one = analyze_axes(flat()).class_named("first.weight[0]")
    assert [(o.tensor, o.dim, o.multiplicity) for o in one.occurrences] == [("first.weight", 0, 1), ("first.bias", 0, 1), ("last.weight", 1, 16)]


def test_a_part_that_only_its_own_reader_uses_shrinks_alone() -> None:
    program = linears(shared_and_own, 8)()
    small = resized(program, {"first.weight[0].0": [0, 2]})
    shapes = {name: tuple(p.shape) for name, p in small.graph_module.named_parameters()}
    assert shapes == {"first.weight": (10, 6), "first.bias": (10,), "last.weight": (4, 6), "last.bias": (4,)}
