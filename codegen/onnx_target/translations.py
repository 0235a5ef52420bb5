"""Translations of a few ATen operators that torch.onnx knows only after its own decomposition, or writes with more nodes than needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.nodes import argument

aten = torch.ops.aten
ATTENTION_OPSET = 23  # from here on ONNX has an Attention operator, and torch.onnx uses it

# Operators that torch.onnx knows only under another name.
SYNONYMS = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor, aten.__xor__.Tensor: aten.bitwise_xor.Tensor}


def translations(graph: fx.Graph, op: Any, opset: int) -> dict[Any, Callable[..., Any]]:
    """Translations that suit every node of their operator in `graph`; `op` is the onnxscript opset to write with."""
    offers = (
        (aten.scaled_dot_product_attention.default, _is_plain_attention, _attention(op)),
        (aten.adaptive_avg_pool2d.default, _is_global_pool, lambda x, *_: op.GlobalAveragePool(x)),
        (aten.min.other, lambda _: True, lambda x, y: op.Min(x, y)),
        (aten.max.other, lambda _: True, lambda x, y: op.Max(x, y)),
    )
    table: dict[Any, Callable[..., Any]] = {}
    for target, suits, translation in offers:
        nodes = [n for n in graph.nodes if n.target is target]
        if all(suits(n) for n in nodes) and not (target is offers[0][0] and opset >= ATTENTION_OPSET):
            table[target] = translation
    return table


def _is_global_pool(node: fx.Node) -> bool:
    return list(argument(node, "output_size")) == [1, 1] and argument(node, "self").meta["val"].dim() == 4


def _is_plain_attention(node: fx.Node) -> bool:
    """Neither dropout, `is_causal` nor grouped heads, and a known head width."""
    width = argument(node, "query").meta["val"].shape[-1]
    return isinstance(width, int) and not any(argument(node, option) for option in ("dropout_p", "is_causal", "enable_gqa"))


def _attention(op: Any) -> Callable[..., Any]:
    """Plain attention in 7 nodes; torch.onnx writes 18, for it computes the scale and the key's transposed shape from sizes at every run."""
    import onnx_ir as ir

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, scale: float | None = None, **__: Any) -> Any:
        def number(x: float) -> Any:
            return op.Constant(value=ir.tensor(x, dtype=query.dtype))

        rank, width = len(query.shape), query.shape[-1]
        turned = [*range(rank - 2), rank - 1, rank - 2]
        scores = op.MatMul(op.Mul(query, number(width**-0.5 if scale is None else scale)), op.Transpose(key, perm=turned))
        if attn_mask is not None:
            boolean = attn_mask.dtype == ir.DataType.BOOL
            scores = op.Add(scores, op.Where(attn_mask, number(0.0), number(-math.inf)) if boolean else attn_mask)
        shares = op.Softmax(scores, axis=-1)
        # A row that may look at no key is NaN here and 0 in torch.
        return op.MatMul(op.Where(op.IsNaN(shares), number(0.0), shares), value)

    return attention
