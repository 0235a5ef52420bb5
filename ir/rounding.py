"""Numbers as they are stored: rounded to a narrower float type, scales never to zero, nothing ever to infinity or cut."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import FormatError

SMALLEST_HALF = 2.0**-24  # subnormal halves too: the 8-bit steps of weights near 1e-3 are such


def check_range(values: Tensor, dtype: torch.dtype) -> None:
    """FormatError when a magnitude is larger than `dtype` can hold."""
    limit = torch.finfo(dtype).max
    if bool((values.abs() > limit).any()):
        raise FormatError(f"{str(dtype).removeprefix('torch.')} holds magnitudes up to {limit:g}, got {float(values.abs().max()):g}; store it as float32")


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (any shape) in `dtype`; FormatError beyond its range."""
    check_range(values, dtype)
    return values.to(dtype)


def fit(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` (any shape, not negative) as large as `dtype` needs; 0, which belongs to weights that are all 0, becomes 1. FormatError beyond its range."""
    smallest = SMALLEST_HALF if dtype is torch.float16 else torch.finfo(dtype).smallest_normal
    check_range(scale, dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=smallest)


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded up to `dtype` (float16 or float32), so that it still spans what it spanned; in the dtype of `scale`."""
    wanted = fit(scale, dtype)
    rounded = wanted.to(dtype)
    if dtype is torch.float16:
        below = (rounded.to(scale.dtype) < wanted).to(torch.int16)
        rounded = (rounded.view(torch.int16) + below).view(torch.float16)  # the next larger half: positive floats sort like their bits
    return rounded.to(scale.dtype)
