"""Attention over a cache in ONNX: `com.microsoft::GroupQueryAttention`, which turns, grows the cache, scores and sums in one kernel.

Padding on the left goes in as an attention bias. Rotary positions are counted from the first slot of the cache, padding included: scores depend on
differences of positions alone. The bias of what is masked is finite, so that rows of padding, which may look at nothing, stay finite too.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ...ir.cached_attention import fuse_cached_attentions
from ...ir.edit import Editor
from ...ir.nodes import op_name
from ...ir.program import Program
from .causal_masks import leave_out_causality
from .extras import require
from .shared_data import CONTRIB

CACHE_PROPERTY, IN_PLACE = "fxpress_cache", "in place"  # metadata of a file whose caches may be buffers
MASKED, MASKED_HALF = -1e30, -6e4
WIDTH_MULTIPLE, ROTARY_MULTIPLE = 8, 16  # of the width of heads, or ONNX Runtime does not take them, or does not turn them
WHY = "exporting to ONNX"
_DEFAULTS = {"scale": 1.0, "do_rotary": 0, "kv_cache_bit_width": 0, "k_quant_type": "NONE", "v_quant_type": "NONE"}


def with_cached_attention(program: Program, *, contrib: bool) -> tuple[Program, tuple[str, ...]]:
    """A clone whose attentions over caches are one operator each, and notes on those that stay as they are.

    `contrib`: prepared for ONNX Runtime's own operator, whose caches may be buffers; else for the standard one.
    """
    clone = program.clone()
    with Editor(clone, "onnx") as editor:
        left = fuse_cached_attentions(editor, rotary_multiple=ROTARY_MULTIPLE if contrib else 2, multiple=WIDTH_MULTIPLE if contrib else 1)
        if contrib:
            leave_out_causality(editor)
            if not left:
                _measure_by_mask(clone)
    return clone, tuple(f"{count} attentions are spelled out: {why}" for why, count in Counter(left.values()).items())


def _measure_by_mask(program: Program) -> None:
    """Let what is held be as long as the mask says, not as the caches are: then a cache may be a buffer with room for tokens to come."""
    graph, caches = program.graph, program.cache_nodes
    places: dict[Any, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), program.inputs.dynamic, strict=True))
    long, short = ((n, a) for parts in (("new", "past"), ("new",)) for n, axes in places.items() for a, d in axes.items() if d.parts == parts)
    for node in [n for n in graph.nodes if op_name(n).startswith("aten.sym_size") and n.args[0] in caches]:
        axis = places[node.args[0]].get(node.args[1])
        if axis is None or axis.name != "past":
            continue
        with graph.inserting_before(node):
            sizes = [graph.call_function(torch.ops.aten.sym_size.int, place) for place in (long, short)]
            node.replace_all_uses_with(graph.call_function(operator.sub, tuple(sizes)))


def masked(kind: Any) -> float:
    """Bias of what may not be seen, finite in the element type `kind`."""
    import onnx_ir as ir

    return MASKED_HALF if kind == ir.DataType.FLOAT16 else MASKED


def translation(op: Any) -> dict[Any, Callable[..., Any]]:
    """The operator as GroupQueryAttention; `op` is the onnxscript opset to write with."""
    import onnx_ir as ir

    attend = _operator()

    def number(value: float, kind: Any) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=kind))

    def translated(
        query: Any, key: Any, value: Any, past_key: Any, past_value: Any, mask: Any, cos: Any, sin: Any, key_scale: Any, value_scale: Any,
        heads: int, groups: int, scale: float,
    ) -> Any:  # fmt: skip
        total = op.Cast(op.Shape(mask, start=3, end=4), to=ir.DataType.INT32)
        lengths = op.Expand(op.Sub(total, number(1, ir.DataType.INT32)), op.Shape(mask, start=0, end=1))
        bias = op.Where(mask, number(0.0, query.dtype), number(masked(query.dtype), query.dtype))
        options: dict[str, Any] = {"do_rotary": 1} if cos is not None else {}
        options |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"} if key_scale is not None else {}
        units = [op.Cast(s, to=ir.DataType.FLOAT) for s in (key_scale, value_scale)] if key_scale is not None else []
        return attend(
            query, key, value, past_key, past_value, lengths, op.Squeeze(total), cos, sin, None, bias, *([None, *units] if units else []),
            num_heads=heads, kv_num_heads=groups, scale=scale, **options,
        )  # fmt: skip

    return {torch.ops.fxpress.cached_attention.default: translated}


def _operator() -> Any:
    """GroupQueryAttention with the inputs and attributes that are used here."""
    onnx, values = require("onnx", WHY), require("onnxscript", WHY).values
    schema_of = onnx.defs.OpSchema
    parameter, optional = schema_of.FormalParameter, schema_of.FormalParameterOption.Optional
    floats = ["tensor(float)", "tensor(float16)"]
    inputs = [parameter(n, "T") for n in ("query", "key", "value")] + [parameter(n, "C") for n in ("past_key", "past_value")]
    inputs += [parameter(n, "M") for n in ("seqlens_k", "total_sequence_length")]
    inputs += [parameter(n, "T", param_option=optional) for n in ("cos_cache", "sin_cache")]
    inputs += [parameter("position_ids", "P", param_option=optional), parameter("attention_bias", "T", param_option=optional)]
    inputs += [parameter("head_sink", "T", param_option=optional), *(parameter(n, "S", param_option=optional) for n in ("k_scale", "v_scale"))]
    schema = schema_of(
        "GroupQueryAttention", CONTRIB, 1,
        inputs=inputs,
        outputs=[parameter("output", "T"), *(parameter(n, "C") for n in ("present_key", "present_value"))],
        type_constraints=[
            ("T", floats, ""), ("C", [*floats, "tensor(int8)"], ""), ("M", ["tensor(int32)"], ""), ("P", ["tensor(int64)"], ""), ("S", ["tensor(float)"], ""),
        ],
        attributes=[
            *(schema_of.Attribute(n, schema_of.AttrType.INT) for n in ("num_heads", "kv_num_heads")),
            *(schema_of.Attribute(n, onnx.helper.make_attribute(n, default)) for n, default in _DEFAULTS.items()),
        ],
    )  # fmt: skip
    return values.Op(values.Opset(CONTRIB, 1), "GroupQueryAttention", schema)
