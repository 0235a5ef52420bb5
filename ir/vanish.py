"""Whether masking a class makes a value zero: what tells removing an index from zeroing it where activations are multiplied and summed.

Zeroing an index of every parameter gives `sigmoid` one half there; multiplied by a weight that is zeroed too it is gone, summed in `q @ k` it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from .atoms import Atom, Axis, leaves
from .nodes import argument, op_name

if TYPE_CHECKING:
    from .axes import Tracer

DEPTH = 64  # operators looked through before the answer is no

# Zero at a position when the first argument is zero at the positions it comes from.
KEEPING = frozenset({
    "relu", "relu6", "leaky_relu", "gelu", "silu", "tanh", "hardswish", "elu", "celu", "selu", "mish", "neg", "abs", "sign", "sgn", "sin", "sinh", "asin",
    "asinh", "atan", "atanh", "tan", "erf", "expm1", "log1p", "sqrt", "square", "softshrink", "hardshrink", "prelu", "_prelu_kernel", "glu", "clone",
    "alias", "detach", "_to_copy", "zeros_like", "view", "reshape", "_unsafe_view", "view_copy", "permute", "permute_copy",
    "transpose", "t", "unsqueeze", "squeeze", "expand", "expand_copy", "repeat", "repeat_interleave", "slice", "split", "split_with_sizes", "split_copy",
    "select", "unbind", "flip", "roll", "tril", "triu", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "pixel_shuffle", "index_select", "type_as", "mean", "sum",
})  # fmt: skip
NORMS = frozenset({
    "layer_norm", "native_layer_norm", "rms_norm", "_native_batch_norm_legit_no_training", "group_norm", "native_group_norm", "instance_norm",
})  # fmt: skip
CONVOLUTIONS = frozenset({
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
})  # fmt: skip


def vanishes(t: Tracer, node: Any, leaf: Atom, depth: int = 0) -> bool:
    """Whether the value of `node` carries `leaf` and is surely zero wherever the leaf's masked indices are."""
    if not isinstance(node, fx.Node) or depth > DEPTH or not _carries(t.axes[node], leaf):
        return False
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    name = op_name(node).removeprefix("aten.").split(".")[0]
    return _call(t, node, name, leaf, depth + 1)


def _call(t: Tracer, node: fx.Node, name: str, leaf: Atom, depth: int) -> bool:
    def zero(value: Any) -> bool:
        return value is None or value == 0 if not isinstance(value, fx.Node) else vanishes(t, value, leaf, depth)

    if name in KEEPING or name == "getitem":
        return zero(node.args[0])
    if name == "mul":
        return zero(node.args[0]) or zero(node.args[1])
    if name == "div":
        return zero(node.args[0]) and not zero(node.args[1])
    if name in ("add", "sub"):
        return zero(node.args[0]) and zero(node.args[1])
    if name == "cat":
        return all(zero(x) for x in node.args[0] if _carries(t.axes[x], leaf))  # type: ignore[union-attr,index]
    if name in NORMS:
        return isinstance(argument(node, "weight"), fx.Node) and zero(argument(node, "weight")) and zero(argument(node, "bias"))
    if name in CONVOLUTIONS:
        return zero(argument(node, "weight")) and zero(argument(node, "bias"))
    return _product(t, node, name, leaf, depth)


def _product(t: Tracer, node: fx.Node, name: str, leaf: Atom, depth: int) -> bool:
    """A product is zero where an operand is that carries the leaf on an axis which is not summed over."""
    if name == "scaled_dot_product_attention":
        return vanishes(t, argument(node, "value"), leaf, depth)
    names = {"linear": ("input", "weight", "bias"), "addmm": ("mat1", "mat2", "self"), "baddbmm": ("batch1", "batch2", "self")}
    if name in ("mm", "bmm", "matmul"):
        left, right, added = node.args[0], node.args[1], None
    elif name in names:
        left, right, added = (argument(node, n) for n in names[name])
    else:
        return False
    summed = -1 if name == "linear" else -2
    found = any(vanishes(t, x, leaf, depth) and _carries(_without(t.of(x), d), leaf) for x, d in ((left, -1), (right, summed)))
    return found and (added is None or vanishes(t, added, leaf, depth))


def _without(axes: tuple[Axis, ...], d: int) -> tuple[Axis, ...]:
    d = max(d, -len(axes)) % len(axes)
    return axes[:d] + axes[d + 1 :]


def _carries(result: Any, leaf: Atom) -> bool:
    if isinstance(result, list):
        return any(_carries(r, leaf) for r in result)
    return result is not None and any(leaf in leaves(axis) for axis in result)
