"""The custom operators of compressed sites: decode the payload, then do the plain op.

A compressed site is one node `fxpress::linear | conv | embedding`. Its format is a text spec in the arguments, so it can be read in the
printed graph, re-exported, saved and lowered. `shape` is the weight's shape as the plain op takes it (linear `[N, K]`, conv
`[O, I/groups, *kernel]`, embedding `[V, D]`); the payload stores the matrix `[N, K]` of `WeightSite.to_matrix`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats.base import name_payload, parse_format

_reused: ContextVar[dict[int, Tensor] | None] = ContextVar("fxpress_reused_weights", default=None)


@contextmanager
def decode_once() -> Iterator[None]:
    """Within the block a payload is decoded at its first use and the weight kept until the end: for running one site on many batches."""
    token = _reused.set({})
    try:
        yield
    finally:
        _reused.reset(token)


def decode_weight(payload: Sequence[Tensor], weight_format: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The dense weight of `shape` in `dtype` that the payload stands for."""
    kept = _reused.get()
    if kept is not None and id(payload[0]) in kept:
        return kept[id(payload[0])]
    rows, columns = shape[0], prod(shape[1:])
    fmt = parse_format(weight_format)
    named = name_payload(fmt, payload, rows, columns, dtype)
    weight = fmt.decode(named, rows, columns, dtype).reshape(list(shape))
    if kept is not None:
        kept[id(payload[0])] = weight
    return weight


@torch.library.custom_op("fxpress::linear", mutates_args=())
def linear(x: Tensor, payload: Sequence[Tensor], bias: Tensor | None, weight_format: str, shape: Sequence[int]) -> Tensor:
    """`x: [..., K] -> [..., N]` with the decoded weight `[N, K]`."""
    return F.linear(x, decode_weight(payload, weight_format, shape, x.dtype), bias)


@linear.register_fake
def _(x: Tensor, payload: Sequence[Tensor], bias: Tensor | None, weight_format: str, shape: Sequence[int]) -> Tensor:
    return x.new_empty([*x.shape[:-1], shape[0]])


@torch.library.custom_op("fxpress::conv", mutates_args=())
def conv(
    x: Tensor,
    payload: Sequence[Tensor],
    bias: Tensor | None,
    weight_format: str,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """1-d or 2-d convolution of `x: [B, I, *space]` with the decoded weight `[O, I/groups, *kernel]`."""
    return _plain_conv(x, decode_weight(payload, weight_format, shape, x.dtype), bias, stride, padding, dilation, groups)


@conv.register_fake
def _(
    x: Tensor,
    payload: Sequence[Tensor],
    bias: Tensor | None,
    weight_format: str,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return _plain_conv(x, x.new_empty(list(shape)), bias, stride, padding, dilation, groups)


def _plain_conv(x: Tensor, w: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    plain = {3: F.conv1d, 4: F.conv2d}[w.dim()]
    return plain(x, w, bias, list(stride), list(padding), list(dilation), groups)


@torch.library.custom_op("fxpress::embedding", mutates_args=())
def embedding(indices: Tensor, payload: Sequence[Tensor], weight_format: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows `[..., D]` of the decoded table `[V, D]` at integer `indices: [...]`."""
    return F.embedding(indices, decode_weight(payload, weight_format, shape, dtype))


@embedding.register_fake
def _(indices: Tensor, payload: Sequence[Tensor], weight_format: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return indices.new_empty([*indices.shape, shape[1]], dtype=dtype)
