"""Scales as they are stored: rounded to a narrower float type, never to zero or to infinity."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_HALF = 2.0**-24  # subnormal halves too: the 8-bit steps of weights near 1e-3 are such


def fit(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` (any shape, not negative) within what `dtype` can hold; a scale of 0, which belongs to weights that are all 0, becomes 1."""
    info = torch.finfo(dtype)
    smallest = SMALLEST_HALF if dtype is torch.float16 else info.smallest_normal
    return torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(smallest, info.max)


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded up to `dtype` (float16 or float32), so that it still spans what it spanned; in the dtype of `scale`."""
    wanted = fit(scale, dtype)
    rounded = wanted.to(dtype)
    if dtype is torch.float16:
        below = (rounded.to(scale.dtype) < wanted).to(torch.int16)
        rounded = (rounded.view(torch.int16) + below).view(torch.float16)  # the next larger half: positive floats sort like their bits
    return rounded.to(scale.dtype)
