"""Attention over a cache in standard operators: `RotaryEmbedding` and `Attention` of opset 23, which takes past keys and values and returns the grown ones.

Caches grow from call to call; there is no standard in-place form that ONNX Runtime 1.32 runs. The bias of what is masked is finite, as in the other form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...ir.int8_caches import LIMIT
from .cached_attention import masked

PRODUCTS = frozenset({"MatMul", "Gemm", "Add", "Site"})
STANDARD_OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
LAST_STANDARD_OPSET = 25  # onnx cannot convert RotaryEmbedding beyond it


def translation(op: Any) -> dict[Any, Callable[..., Any]]:
    """`fxpress::cached_attention` as standard operators; `op` is the onnxscript opset to write with."""
    import onnx_ir as ir

    def numbers(*values: int) -> Any:
        return op.Constant(value=ir.tensor(values, dtype=ir.DataType.INT64))

    def flat(x: Any, width: int) -> Any:
        """With a last axis that shape inference knows; parts of a fused product may come through sequences, whose shapes it does not follow."""
        producer = x.producer()
        return x if producer is not None and producer.op_type in PRODUCTS else op.Reshape(x, numbers(0, 0, width))

    def turned(x: Any, cos: Any, sin: Any, mask: Any, heads: int) -> Any:
        total, new = (op.Squeeze(op.Shape(mask, start=axis, end=axis + 1), numbers(0)) for axis in (3, 2))
        row = op.Unsqueeze(op.Range(op.Sub(total, new), total, op.Squeeze(numbers(1), numbers(0))), numbers(0))
        positions = op.Expand(row, op.Concat(op.Shape(mask, start=0, end=1), numbers(1), axis=0))
        return op.RotaryEmbedding(x, cos, sin, positions, num_heads=heads)

    def apart(x: Any, heads: int) -> Any:
        """`[B, S, heads D] -> [B, heads, S, D]`."""
        return op.Transpose(op.Reshape(x, numbers(0, 0, heads, -1)), perm=[0, 2, 1, 3])

    def grown(past: Any, new: Any, unit: Any, groups: int, kind: ir.DataType) -> tuple[Any, Any]:
        """The cache in 8 bits with new codes behind it, and what it says."""
        rounded = op.Round(op.Div(apart(new, groups), unit))
        low, high = (op.Constant(value=ir.tensor(v, dtype=kind)) for v in (-LIMIT - 1.0, float(LIMIT)))
        held = op.Concat(past, op.Cast(op.Clip(rounded, low, high), to=ir.DataType.INT8), axis=2)
        return held, op.Mul(op.Cast(held, to=kind), unit)

    def translated(
        query: Any, key: Any, value: Any, past_key: Any, past_value: Any, mask: Any, cos: Any, sin: Any, key_scale: Any, value_scale: Any,
        heads: int, groups: int, scale: float,
    ) -> Any:  # fmt: skip
        kind, width = query.dtype, past_key.shape[3]
        query, key, value = (flat(x, count * width) for x, count in ((query, heads), (key, groups), (value, groups)))
        bias = op.Where(mask, op.Constant(value=ir.tensor(0.0, dtype=kind)), op.Constant(value=ir.tensor(masked(kind), dtype=kind)))
        if cos is not None:
            query, key = turned(query, cos, sin, mask, heads), turned(key, cos, sin, mask, groups)
        options = {"q_num_heads": heads, "kv_num_heads": groups, "scale": scale}
        if key_scale is None:
            return op.Attention(query, key, value, bias, past_key, past_value, **options)[:3]
        (keys, k), (values, v) = grown(past_key, key, key_scale, groups, kind), grown(past_value, value, value_scale, groups, kind)
        found = op.Attention(apart(query, heads), k, v, bias, scale=scale)[0]
        return op.Reshape(op.Transpose(found, perm=[0, 2, 1, 3]), numbers(0, 0, -1)), keys, values

    return {torch.ops.fxpress.cached_attention.default: translated}
