"""Passes over the ONNX graph that change no value: fusable norms, dead nodes and duplicates out, metadata out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .branches import split_group_sums
from .rms_norms import fuse_rms_norms, fuse_skip_norms
from .standard_attention import STANDARD_OPSET

if TYPE_CHECKING:
    import onnx_ir


def divide_by_roots(model: onnx_ir.Model) -> None:
    """Write `x * Reciprocal(Sqrt(v))` as `x / Sqrt(v)`, the form in which ONNX Runtime knows an RMS norm and fuses it to one kernel."""
    import onnx_ir as ir

    for node in [n for n in model.graph if n.op_type == "Reciprocal"]:
        inverse, root = node.outputs[0], node.inputs[0]
        if root is None or (producer := root.producer()) is None or producer.op_type != "Sqrt":
            continue
        for product in [n for n in inverse.consumers() if n.op_type == "Mul" and n.inputs.count(inverse) == 1]:
            other = product.inputs[0] if product.inputs[1] is inverse else product.inputs[1]
            quotient = ir.node("Div", inputs=[other, root])
            model.graph.insert_before(product, quotient)
            _replace(model, product, quotient)


def drop_zero_biases(model: onnx_ir.Model) -> None:
    """Take out the biases that torch.onnx gives convolutions without one: zeros expanded at run time, with which ONNX Runtime leaves its blocked layout."""
    import onnx_ir as ir

    for node in [n for n in model.graph if n.op_type in ("Conv", "ConvTranspose") and len(n.inputs) > 2]:
        value = node.inputs[2]
        while value is not None and (producer := value.producer()) is not None and producer.op_type in ("Expand", "CastLike"):
            value = producer.inputs[0]
        constant = None if value is None or value is node.inputs[2] else ir.convenience.get_const_tensor(value)
        if constant is not None and not constant.numpy().any():
            node.resize_inputs(2)


def _replace(model: onnx_ir.Model, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    """Let `new` produce what `old` produced, under its name and type."""
    import onnx_ir as ir

    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)


def clean_up(model: onnx_ir.Model, *, contrib: bool = False) -> None:
    """Identities, repeated nodes, dead nodes, dead initializers, unused domains and the exporter's metadata; `contrib`: sums join the norms behind them."""
    from onnx_ir.passes import common

    common.InlinePass()(model)
    divide_by_roots(model)
    drop_zero_biases(model)
    common.RemoveUnusedNodesPass()(model)
    if contrib:
        fuse_skip_norms(model)
    elif model.opset_imports[""] >= STANDARD_OPSET:
        fuse_rms_norms(model)
    split_group_sums(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()


def initializer_bytes(model: onnx_ir.Model) -> int:
    """Bytes of all stored tensors."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
