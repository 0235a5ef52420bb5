"""Facts read off FX nodes: module path, printed type, operator name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "ui8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True)
class TensorType:
    """Shape (ints, or text for symbolic sizes) and dtype of a node's value."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{_SHORT.get(self.dtype, str(self.dtype).removeprefix('torch.'))}[{', '.join(map(str, self.shape))}]"


def tensor_type(value: Any) -> TensorType | None:
    """Type of a tensor value (real or fake), or None for anything else."""
    if not isinstance(value, Tensor):
        return None
    return TensorType(tuple(s if isinstance(s, int) else str(s) for s in value.shape), value.dtype)


def get_tensor(module: torch.nn.Module, name: str) -> Tensor:
    """Parameter or buffer by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{name} is a {type(tensor).__name__}, not a tensor")
    return tensor


def node_type(node: fx.Node) -> TensorType | None:
    """Type of the node's value: of the real tensor for `get_attr`, else from `val`, else as it was loaded from a file."""
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return tensor_type(get_tensor(node.graph.owning_module, str(node.target)))
    return tensor_type(node.meta.get("val")) or node.meta.get("loaded_type")


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module the node was traced in; empty at the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path.removeprefix("L['self']").removeprefix(".")


def op_name(node: fx.Node) -> str:
    """Short operator name: `aten.linear`, `fxpress.linear`, `getitem`, or the node's op for the rest."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        overload = node.target._overloadname
        return f"{namespace}.{name}" + ("" if overload == "default" else f".{overload}")
    return getattr(node.target, "__name__", str(node.target))


def argument(node: fx.Node, name: str) -> Any:
    """Argument of an ATen or fxpress call by its schema name, default filled in; None when the schema has no such argument."""
    for i, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if arg.name == name:
            positional = node.args[i] if i < len(node.args) else arg.default_value
            return node.kwargs.get(name, positional)
    return None
