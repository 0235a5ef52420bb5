"""Rules of norms: what they go over is tagged, what they index by is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.program import Program

from ...masking import assert_case, between_convs, between_linears
from ...tiny import randn

aten = torch.ops.aten


class Native(nn.Module):
    """A norm called by its operator, with a weight and a bias."""

    def __init__(self, function: Callable[..., Any], channels: int) -> None:
        super().__init__()
        self.function, self.weight, self.bias = function, nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))
        self.register_buffer("mean", randn(channels))
        self.register_buffer("var", randn(channels).abs() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias, self.mean, self.var)


def native(function: Callable[..., Any]) -> Callable[[], Program]:
    return lambda: between_convs(Native(function, 8))


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.layer_norm", lambda: between_linears(nn.LayerNorm(12)), "first.weight[0]~"),
    ("aten.layer_norm", lambda: between_linears(nn.LayerNorm((3, 12), elementwise_affine=False)), "first.weight[0]~"),
    ("aten.native_layer_norm", lambda: between_linears(Native(lambda x, w, b, m, v: aten.native_layer_norm.default(x, [12], w, b, 1e-5)[0], 12)),
     "first.weight[0]~"),
    ("aten.rms_norm", lambda: between_linears(nn.RMSNorm(12)), "first.weight[0]~"),
    ("aten._fused_rms_norm", lambda: between_linears(Native(lambda x, w, b, m, v: aten._fused_rms_norm.default(x, [12], w, 1e-5)[0], 12)), "first.weight[0]~"),
    ("aten._native_batch_norm_legit_no_training", lambda: between_convs(nn.BatchNorm2d(8)), "first.weight[0]"),
    ("aten._native_batch_norm_legit_no_training", lambda: between_convs(nn.BatchNorm2d(8, affine=False)), "first.weight[0]"),
    ("aten._native_batch_norm_legit", lambda: between_convs(nn.BatchNorm2d(8, track_running_stats=False)), "!aten._native_batch_norm_legit.no_stats"),
    ("aten._batch_norm_no_update", native(lambda x, w, b, m, v: aten._batch_norm_no_update.default(x, w, b, m, v, 0.1, 1e-5)[0]), "first.weight[0]"),
    ("aten.instance_norm", lambda: between_convs(nn.InstanceNorm2d(8, affine=True)), "first.weight[0]"),
    ("aten.group_norm", lambda: between_convs(nn.GroupNorm(2, 8)), "first.weight[0].0 first.weight[0].1~"),
    ("aten.group_norm", lambda: between_convs(nn.GroupNorm(8, 8)), "first.weight[0]"),
    ("aten.group_norm", lambda: between_convs(nn.GroupNorm(1, 8, affine=False)), "first.weight[0]~"),
    ("aten.native_group_norm", native(lambda x, w, b, m, v: aten.native_group_norm.default(x, w, b, 2, 8, 36, 2, 1e-5)[0]),
     "first.weight[0].0 first.weight[0].1~"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)
