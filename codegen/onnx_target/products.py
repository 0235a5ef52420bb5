"""Products of one input by several low-bit weights as one product: query, key and value; gate and up.

ONNX Runtime quantizes the input of every MatMulNBits to 8 bits and wakes its threads for each; together that costs once. Nothing changes in a value. Attention
(`GroupQueryAttention`) takes query, key and value packed as they come; other readers get a `Split`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...ir.formats.bitpack import pack

if TYPE_CHECKING:
    import onnx_ir

Pair = tuple["onnx_ir.Node", "onnx_ir.Node"]  # the product, and the DequantizeLinear of its weight


def merge_products(model: onnx_ir.Model, sites: Mapping[onnx_ir.Node, str]) -> list[str]:
    """Merge the products in `sites` (node to site) that read one input in blocks of one kind; returns the sites that joined another's. Dead nodes stay."""
    joined: list[str] = []
    groups: dict[Any, list[Pair]] = {}
    for product in [n for n in model.graph if n in sites]:
        weight = _blocks(product)
        if weight is not None:
            kinds = tuple(None if v is None else (_stored(v).dtype, _cast_to(v)) for v in weight.inputs)
            groups.setdefault((product.inputs[0], weight.attributes.get_int("block_size", 0), kinds), []).append((product, weight))
    for pairs in groups.values():
        if len(pairs) > 1:
            _merge(model, pairs)
            joined += [sites[p] for p, _ in pairs[1:]]
    return joined


def _blocks(product: onnx_ir.Node) -> onnx_ir.Node | None:
    """The block-wise DequantizeLinear of stored codes, scales (cast or not) and zero points that the product alone reads."""
    weight = product.inputs[1].producer() if product.op_type == "MatMul" and product.inputs[1] is not None else None
    if weight is None or weight.op_type != "DequantizeLinear" or len(weight.outputs[0].uses()) > 1 or not weight.attributes.get_int("block_size", 0):
        return None
    return weight if all(v is None or _stored(v) is not None for v in weight.inputs) else None


def _stored(value: onnx_ir.Value) -> Any:
    """The stored tensor behind a value, through a Cast."""
    import onnx_ir as ir

    producer = value.producer()
    return ir.convenience.get_const_tensor(producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value)


def _cast_to(value: onnx_ir.Value) -> int | None:
    producer = value.producer()
    return producer.attributes.get_int("to") if producer is not None and producer.op_type == "Cast" else None


def _merge(model: onnx_ir.Model, pairs: list[Pair]) -> None:
    import onnx_ir as ir

    first, weight = pairs[0]
    read: list[onnx_ir.Value | None] = []
    for place, value in enumerate(weight.inputs):
        if value is None:
            read.append(None)
            continue
        made = _side_by_side([_stored(w.inputs[place]) for _, w in pairs])
        name = f"{_stored(value).name}.merged"
        made.name = name
        stored = ir.val(name, const_value=made)
        model.graph.register_initializer(stored)
        if (kind := _cast_to(value)) is not None:
            cast = ir.node("Cast", [stored], attributes={"to": kind})
            model.graph.insert_before(first, cast)
            stored = cast.outputs[0]
        read.append(stored)
    blocks = ir.Node("", "DequantizeLinear", read, attributes=list(weight.attributes.values()))
    product = ir.node("MatMul", [first.inputs[0], blocks.outputs[0]])
    model.graph.insert_before(first, [blocks, product])
    _hand_out(model, product, pairs)


def _hand_out(model: onnx_ir.Model, product: onnx_ir.Node, pairs: list[Pair]) -> None:
    """Give every reader its part."""
    import onnx_ir as ir

    outputs = [p.outputs[0] for p, _ in pairs]
    readers = {use.node for o in outputs for use in o.uses()}
    (attention,) = readers if len(readers) == 1 else (None,)
    if attention is not None and attention.op_type == "GroupQueryAttention" and list(attention.inputs[:3]) == outputs:
        for place, value in enumerate((product.outputs[0], None, None)):
            attention.replace_input_with(place, value)
        return
    sizes = ir.tensor(np.array([_stored(w.inputs[0]).shape[1] for _, w in pairs], np.int64), name=f"{outputs[0].name}.sizes")
    stored = ir.val(str(sizes.name), const_value=sizes)
    model.graph.register_initializer(stored)
    split = ir.node("Split", [product.outputs[0], stored], attributes={"axis": -1}, num_outputs=len(pairs))
    model.graph.insert_after(product, split)
    for old, new in zip(outputs, split.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _side_by_side(tensors: list[Any]) -> Any:
    """`[K, N]` tensors along N, packed as they were."""
    import onnx_ir as ir

    kind = tensors[0].dtype
    if kind.bitwidth >= 8:
        return ir.tensor(np.concatenate([t.numpy() for t in tensors], 1))
    codes = np.concatenate([t.numpy().astype(np.int8).view(np.uint8) & (2**kind.bitwidth - 1) for t in tensors], 1)
    return ir.PackedTensor(pack(torch.from_numpy(codes).flatten(), kind.bitwidth).numpy(), kind, shape=codes.shape)
