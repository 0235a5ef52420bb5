"""The custom operators of compressed sites: decode the payload, then do the plain op.

A compressed site is one node `fxpress::linear | conv | embedding`. Its format is a text spec in the arguments, so it can be read in the
printed graph, re-exported, saved and lowered. `shape` is the weight's shape as the plain op takes it (linear `[N, K]`, conv
`[O, I/groups, *kernel]`, embedding `[V, D]`); the payload stores the matrix `[N, K]` of `WeightSite.to_matrix`.

Gradients flow to the data and the bias, never to the payload: training runs through compressed sites and leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep `x` and the payload for the way back; the rest are plain values."""
    x, payload, _, *ctx.rest = inputs
    ctx.save_for_backward(x, *payload)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *payload = ctx.saved_tensors
    weight_format, shape = ctx.rest
    weight = decode_weight(payload, weight_format, shape, x.dtype)
    to_x = (grad.to(x.dtype) @ weight) if ctx.needs_input_grad[0] else None
    to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return to_x, [None] * len(payload), to_bias, None, None


linear.register_autograd(_linear_backward, setup_context=_keep)


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
    """1-d, 2-d or 3-d convolution of `x: [B, I, *space]` with the decoded weight `[O, I/groups, *kernel]`."""
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


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *payload = ctx.saved_tensors
    weight_format, shape, stride, padding, dilation, groups = ctx.rest
    weight = decode_weight(payload, weight_format, shape, x.dtype)
    to_x = None
    if ctx.needs_input_grad[0]:
        geometry = (list(stride), list(padding), list(dilation), False, [0] * len(stride), groups)
        to_x = torch.ops.aten.convolution_backward(grad.to(x.dtype), x, weight, None, *geometry, [True, False, False])[0]
    to_bias = grad.sum([0, *range(2, grad.dim())]) if ctx.needs_input_grad[2] else None
    return (to_x, [None] * len(payload), to_bias, *[None] * 6)


conv.register_autograd(_conv_backward, setup_context=_keep)


def _plain_conv(x: Tensor, w: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    plain = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[w.dim()]
    return plain(x, w, bias, list(stride), list(padding), list(dilation), groups)


@torch.library.custom_op("fxpress::embedding", mutates_args=())
def embedding(indices: Tensor, payload: Sequence[Tensor], weight_format: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows `[..., D]` of the decoded table `[V, D]` at integer `indices: [...]`."""
    return F.embedding(indices, decode_weight(payload, weight_format, shape, dtype))


@embedding.register_fake
def _(indices: Tensor, payload: Sequence[Tensor], weight_format: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return indices.new_empty([*indices.shape, shape[1]], dtype=dtype)
