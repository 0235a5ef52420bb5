"""Rules of convolutions, pools, padding and resampling: channels are free, pixels are pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.ir.program import Program

from ...masking import assert_case, between_convs, sandwich
from ...tiny import randn

aten = torch.ops.aten


class Convolution(nn.Module):
    """`aten.convolution` itself, with groups."""

    def __init__(self, transposed: bool, groups: int) -> None:
        super().__init__()
        self.transposed, self.groups, self.bias = transposed, groups, nn.Parameter(torch.ones(8))
        self.weight = nn.Parameter(torch.ones(8, 8 // groups, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return aten.convolution.default(x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], self.transposed, [0, 0], self.groups)


def line(middle: Callable[[Tensor], Tensor], hidden: int = 8, out: int = 8) -> Callable[[], Program]:
    return lambda: sandwich(nn.Conv1d(3, hidden, 1), middle, nn.Conv1d(out, 4, 1), randn(2, 3, 8))


def image(middle: Callable[[Tensor], Tensor], hidden: int = 8, out: int = 8) -> Callable[[], Program]:
    return lambda: between_convs(middle, hidden, out)


def volume(middle: Callable[[Tensor], Tensor], hidden: int = 8, out: int = 8) -> Callable[[], Program]:
    return lambda: sandwich(nn.Conv3d(3, hidden, 1), middle, nn.Conv3d(out, 4, 1), randn(2, 3, 4, 4, 4))


def unbatched() -> Program:
    return sandwich(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), randn(3, 6, 6))


def shuffled(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


def chain(*modules: Any) -> Callable[[Tensor], Tensor]:
    return nn.Sequential(*modules)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return shuffled(x)


CASES: list[tuple[str, Callable[[], Program], str]] = [
    ("aten.conv1d", line(nn.Conv1d(8, 6, 3, padding="same"), 8, 6), "first.weight[0] middle.weight[0]"),
    ("aten.conv2d", image(nn.Conv2d(8, 6, 3, bias=False), 8, 6), "first.weight[0] middle.weight[0]"),
    ("aten.conv2d", image(nn.Conv2d(8, 8, 3, groups=8)), "first.weight[0]"),
    ("aten.conv2d", image(nn.Conv2d(8, 16, 3, groups=8), 8, 16), "first.weight[0] middle.weight[0].1"),
    ("aten.conv2d", image(nn.Conv2d(8, 12, 3, groups=4), 8, 12), "first.weight[0].0 first.weight[0].1 middle.weight[0].1"),
    ("aten.conv2d", image(chain(nn.Conv2d(8, 8, 1, groups=2), Shuffle(), nn.Conv2d(8, 8, 1, groups=2))),
     "first.weight[0].0 first.weight[0].1 middle.0.weight[0].1 middle.0.weight[0].2 middle.2.weight[0].1"),
    ("aten.conv2d", image(chain(nn.Conv2d(8, 8, 1, groups=2), Shuffle(), nn.Conv2d(8, 8, 3, groups=8))),
     "first.weight[0].0 first.weight[0].1 middle.0.weight[0].1"),
    ("aten.conv2d", image(lambda x: shuffled(x)), "first.weight[0].0 first.weight[0].1"),
    ("aten.conv2d", unbatched, "first.weight[0]"),
    ("aten.conv3d", volume(nn.Conv3d(8, 6, 3), 8, 6), "first.weight[0] middle.weight[0]"),
    ("aten.convolution", image(Convolution(False, 2)), "first.weight[0].0 first.weight[0].1 middle.bias[0].1"),
    ("aten.convolution", image(Convolution(True, 2)), "first.weight[0].0 first.weight[0].1 middle.bias[0].1"),
    ("aten.conv_transpose1d", line(nn.ConvTranspose1d(8, 6, 3), 8, 6), "first.weight[0] middle.weight[1]"),
    ("aten.conv_transpose2d", image(nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), 8, 12), "first.weight[0].0 first.weight[0].1 middle.weight[1]"),
    ("aten.conv_transpose2d", image(nn.ConvTranspose2d(8, 8, 2, groups=8)), "first.weight[0]"),
    ("aten.conv_transpose3d", volume(nn.ConvTranspose3d(8, 6, 2, output_padding=0), 8, 6), "first.weight[0] middle.weight[1]"),
    ("aten.max_pool1d", line(nn.MaxPool1d(2)), "first.weight[0]"),
    ("aten.max_pool2d", image(nn.MaxPool2d(3, 2, padding=1)), "first.weight[0]"),
    ("aten.max_pool2d_with_indices", image(lambda x: aten.max_pool2d_with_indices.default(x, [2, 2])[0]), "first.weight[0]"),
    ("aten.max_pool3d", volume(nn.MaxPool3d(2)), "first.weight[0]"),
    ("aten.avg_pool1d", line(nn.AvgPool1d(2)), "first.weight[0]"),
    ("aten.avg_pool2d", image(nn.AvgPool2d(2)), "first.weight[0]"),
    ("aten.avg_pool3d", volume(nn.AvgPool3d(2)), "first.weight[0]"),
    ("aten.adaptive_avg_pool1d", line(nn.AdaptiveAvgPool1d(3)), "first.weight[0]"),
    ("aten.adaptive_avg_pool2d", image(nn.AdaptiveAvgPool2d((1, 1))), "first.weight[0]"),
    ("aten._adaptive_avg_pool2d", image(lambda x: aten._adaptive_avg_pool2d.default(x, [2, 2])), "first.weight[0]"),
    ("aten.adaptive_max_pool1d", line(nn.AdaptiveMaxPool1d(3)), "first.weight[0]"),
    ("aten.adaptive_max_pool2d", image(nn.AdaptiveMaxPool2d(2)), "first.weight[0]"),
    ("aten.upsample_nearest1d", line(nn.Upsample(scale_factor=2)), "first.weight[0]"),
    ("aten.upsample_nearest2d", image(nn.Upsample(scale_factor=2)), "first.weight[0]"),
    ("aten.upsample_bilinear2d", image(nn.Upsample(scale_factor=2, mode="bilinear")), "first.weight[0]"),
    ("aten.upsample_bicubic2d", image(nn.Upsample(size=5, mode="bicubic")), "first.weight[0]"),
    ("aten.upsample_linear1d", line(nn.Upsample(scale_factor=2, mode="linear")), "first.weight[0]"),
    ("aten.pad", image(lambda x: F.pad(x, (1, 0, 2, 1))), "first.weight[0]"),
    ("aten.pad", image(lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)), 8, 13), "first.weight[0] last.weight[1].0 last.weight[1].2"),
    ("aten.pad", image(lambda x: F.pad(x, (0, 0, 0, 0, 0, 8), value=2.0) + torch.cat([x, x], 1), 8, 16), "first.weight[0]"),
    ("aten.pad", image(lambda x: F.pad(x, (0, 0, 0, 0, -2, 3)), 8, 9), ""),
    ("aten.pad", image(lambda x: F.pad(x, (1, 1, 0, 1), mode="reflect")), "first.weight[0]"),
    ("aten.constant_pad_nd", image(lambda x: aten.constant_pad_nd.default(x, [0, 0, 0, 0, 1, 1]), 8, 10), "first.weight[0]"),
    ("aten.reflection_pad1d", line(lambda x: aten.reflection_pad1d.default(x, [1, 1])), "first.weight[0]"),
    ("aten.reflection_pad2d", image(lambda x: aten.reflection_pad2d.default(x, [1, 1, 0, 1])), "first.weight[0]"),
    ("aten.replication_pad1d", line(lambda x: aten.replication_pad1d.default(x, [1, 1])), "first.weight[0]"),
    ("aten.replication_pad2d", image(lambda x: aten.replication_pad2d.default(x, [1, 1, 1, 0])), "first.weight[0]"),
    ("aten.pixel_shuffle", image(nn.PixelShuffle(2), 8, 2), "first.weight[0].0"),
    ("aten.pixel_unshuffle", image(nn.PixelUnshuffle(2), 8, 32), "!aten.pixel_unshuffle"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_removal_is_masking_and_the_rest_is_pinned(name: str, build: Callable[[], Program], expected: str) -> None:
    assert_case(build(), name, expected)
