"""`fxpress_triton::linear`: a product with a packed weight as one operator, so that it shows in the graph and survives `torch.compile` and CUDA graphs.

Small batches run the fused kernel. Large ones (more than `LARGE` rows) rebuild the dense weight once and call the library's product: there the tensor cores are
the limit, not memory. Gradients reach the data and the bias, so frozen weights can stand inside a model that trains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.errors import LowerError
from .layout import TENSORS, Packed, Structure, Tile, Values

LARGE = 128  # rows of data from which the dense weight is rebuilt
OLDEST = (8, 0)  # compute capability that has asynchronous copies and bfloat16
_STATIC = ("rows", "columns", "pairs", "entries", "group", "zeroed", "shift")


def describe(packed: Packed) -> str:
    """Everything about a packed weight but its tensors, as text for the graph."""
    facts: dict[str, Any] = {name: getattr(packed, name) for name in _STATIC}
    facts |= {"structure": packed.structure.value, "values": packed.values_kind.value, "tile": [packed.tile.rows, packed.tile.columns]}
    return json.dumps(facts | {"dtype": str(packed.dtype).removeprefix("torch.")}, sort_keys=True)


@cache
def _facts(layout: str) -> dict[str, Any]:
    data = json.loads(layout)
    tile = Tile(rows=data["tile"][0], columns=data["tile"][1])
    kinds = {"structure": Structure(data["structure"]), "values_kind": Values(data["values"]), "dtype": getattr(torch, data["dtype"]), "tile": tile}
    return kinds | {name: data[name] for name in _STATIC}


def assemble(layout: str, tensors: Sequence[Tensor]) -> Packed:
    """Inverse of `describe` and `Packed.tensors`."""
    parts: dict[str, Any] = _facts(layout) | dict(zip(TENSORS, tensors, strict=True))
    return Packed(**parts)


@torch.library.custom_op("fxpress_triton::linear", mutates_args=())
def linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, layout: str, rows: int) -> Tensor:
    """`x: [..., K] -> [..., rows]` with the packed weight; `bias: [rows]` is added in float32."""
    from .launch import NATIVE, decode, matmul
    from .tuning import tuned_schedule

    packed = assemble(layout, weight)
    _check(x, packed, NATIVE)
    flat = x.reshape(-1, packed.columns).contiguous()
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], rows)
    if len(flat) > LARGE:
        return F.linear(x, decode(packed), bias)
    return matmul(packed, flat, bias, tuned_schedule(packed, len(flat), layout)).reshape(*x.shape[:-1], rows)


@linear.register_fake
def _(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, layout: str, rows: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], rows])


@torch.library.custom_op("fxpress_triton::dense", mutates_args=())
def dense(weight: Sequence[Tensor], layout: str, rows: int, columns: int) -> Tensor:
    """The packed weight decoded, `[rows, columns]`."""
    from .launch import decode

    return decode(assemble(layout, weight))


@dense.register_fake
def _(weight: Sequence[Tensor], layout: str, rows: int, columns: int) -> Tensor:
    return weight[0].new_empty(rows, columns, dtype=_facts(layout)["dtype"])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.weight, bias, ctx.layout, ctx.rows = inputs
    ctx.columns, ctx.bias = x.shape[-1], bias if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of the data and the bias; the packed weight is frozen."""
    of_x = grad @ dense(ctx.weight, ctx.layout, ctx.rows, ctx.columns) if ctx.needs_input_grad[0] else None
    of_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[2] else None
    return of_x, [None] * len(ctx.weight), of_bias, None, None


linear.register_autograd(_gradients, setup_context=_keep)


def _check(x: Tensor, packed: Packed, native: bool) -> None:
    """Refuse data that the kernels would read wrongly."""
    where = f"fxpress_triton.linear [{packed.rows}, {packed.columns}]"
    if x.dtype is not packed.dtype:
        raise LowerError(f"{where}: expected {packed.dtype} data, got {x.dtype}; the program was lowered for {packed.dtype}")
    if x.device != packed.values.device:
        raise LowerError(f"{where}: data on {x.device} and weight on {packed.values.device}; move both to one device")
    for name, tensor in zip(TENSORS, packed.tensors, strict=True):
        if not tensor.is_contiguous():
            raise LowerError(f"{where}: the stored tensor {name!r} is not contiguous; pass it as lower() made it, or its .contiguous()")
    if native and x.device.type != "cuda":
        raise LowerError(f"{where}: Triton kernels need a CUDA device, got tensors on {x.device}; move program and data to 'cuda', or use lower('reference')")
    if native and (found := torch.cuda.get_device_capability(x.device)) < OLDEST:
        raise LowerError(f"{where}: compute capability {found[0]}.{found[1]} is below {OLDEST[0]}.{OLDEST[1]}; use lower('reference') on this GPU")
