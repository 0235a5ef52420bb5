"""RMS norms as one operator: `RMSNormalization` of opset 23, or, with the residual addition before it, `com.microsoft::SkipSimplifiedLayerNormalization`.

ONNX Runtime finds a spelled-out norm by itself when it loads a file, but not the addition before it: a token of a 30-layer model then runs 60 operators fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .shared_data import CONTRIB

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class _Norm:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last axis, `weight: [D]`, and its last node."""

    x: onnx_ir.Value
    weight: onnx_ir.Value
    epsilon: float
    end: onnx_ir.Node


def fuse_skip_norms(model: onnx_ir.Model) -> int:
    """Fuse every RMS norm of a sum with the addition; the sum goes on beside the norm. Returns how many; dead nodes stay."""
    import onnx_ir as ir

    count = 0
    for norm in _norms(model):
        addition = _producer(norm.x, "Add")
        if addition is None or any(_constant(v) is not None for v in addition.inputs) or not _same_shape(*addition.inputs):
            continue
        inputs = [*addition.inputs, norm.weight]
        node = ir.node("SkipSimplifiedLayerNormalization", inputs, attributes={"epsilon": norm.epsilon}, domain=CONTRIB, num_outputs=4)
        model.graph.insert_after(addition, node)
        _hand_over(norm.end.outputs[0], node.outputs[0])
        _hand_over(addition.outputs[0], node.outputs[3])
        count += 1
    return count


def fuse_rms_norms(model: onnx_ir.Model) -> int:
    """Write every RMS norm as the standard operator; returns how many. Dead nodes stay."""
    import onnx_ir as ir

    norms = _norms(model)
    for norm in norms:
        node = ir.node("RMSNormalization", [norm.x, norm.weight], attributes={"axis": -1, "epsilon": norm.epsilon})
        model.graph.insert_after(norm.end, node)
        _hand_over(norm.end.outputs[0], node.outputs[0])
    return len(norms)


def _norms(model: onnx_ir.Model) -> list[_Norm]:
    found = (_norm(n) for n in model.graph if n.op_type == "Sqrt")
    return [f for f in found if f is not None]


def _norm(root: onnx_ir.Node) -> _Norm | None:
    """The norm whose square root this is."""
    inner = _producer(root.inputs[0], "Add")
    constants = [_constant(v) for v in inner.inputs] if inner is not None else []
    place = next((i for i, c in enumerate(constants) if c is not None and c.size == 1), None)
    mean = _producer(inner.inputs[1 - place], "ReduceMean") if inner is not None and place is not None else None
    power = _producer(mean.inputs[0], "Pow") if mean is not None else None
    quotient = _only_reader(root.outputs[0], "Div")
    if mean is None or power is None or quotient is None or place is None or not _over_last_axis(mean) or not _is(power.inputs[1], 2.0):
        return None
    x, product = power.inputs[0], _only_reader(quotient.outputs[0], "Mul")
    if product is None or x is None or quotient.inputs[0] is not x:
        return None
    weight = product.inputs[0] if product.inputs[1] is quotient.outputs[0] else product.inputs[1]
    known = _constant(weight)
    return _Norm(x, weight, float(constants[place]), product) if weight is not None and known is not None and known.ndim == 1 else None


def _hand_over(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Let the readers of `old` read `new`."""
    import onnx_ir as ir

    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _same_shape(one: onnx_ir.Value | None, other: onnx_ir.Value | None) -> bool:
    return one is not None and other is not None and one.shape is not None and one.shape == other.shape


def _producer(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == kind and producer.domain == "" else None


def _only_reader(value: onnx_ir.Value, kind: str) -> onnx_ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == kind else None


def _constant(value: onnx_ir.Value | None) -> Any:
    """The numpy array behind a value, cast or not, or None."""
    import onnx_ir as ir

    while (cast := _producer(value, "CastLike")) is not None:
        value = cast.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _is(value: onnx_ir.Value | None, number: float) -> bool:
    known = _constant(value)
    return known is not None and known.size == 1 and float(known) == number


def _over_last_axis(mean: onnx_ir.Node) -> bool:
    """Whether a mean is over the last axis, which it keeps."""
    value = mean.inputs[1] if len(mean.inputs) > 1 else None
    while (reshape := _producer(value, "Reshape")) is not None:
        value = reshape.inputs[0]
    axes, rank = _constant(value), len(mean.inputs[0].shape) if mean.inputs[0] is not None and mean.inputs[0].shape is not None else 0
    return axes is not None and axes.size == 1 and int(axes.reshape(())) in (-1, rank - 1) and mean.attributes.get_int("keepdims", 1) == 1
