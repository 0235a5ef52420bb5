"""Facts read off FX nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxpress.ir.nodes import TensorType, argument, get_tensor, module_path, node_type, op_name, tensor_type
from fxpress.ir.program import Program


def test_tensor_types_print_short() -> None:
    assert str(tensor_type(torch.zeros(2, 3, dtype=torch.bfloat16))) == "bf16[2, 3]"
    assert str(TensorType(("s0", 4), torch.uint8)) == "ui8[s0, 4]"
    assert str(TensorType((), torch.complex64)) == "complex64[]"
    assert tensor_type([torch.zeros(1)]) is None


def test_nodes_of_a_captured_mlp(captured: Callable[[str], Program]) -> None:
    nodes = {n.name: n for n in captured("mlp").graph.nodes}
    assert op_name(nodes["linear"]) == "aten.linear"
    assert op_name(nodes["x"]) == "placeholder"
    assert module_path(nodes["linear"]) == "up"
    assert module_path(nodes["relu"]) == ""
    assert str(node_type(nodes["up_weight"])) == "f32[20, 12]"
    relu = node_type(nodes["relu"])
    assert relu is not None
    assert relu.shape[1] == 20
    assert isinstance(relu.shape[0], str)  # the dynamic batch


def test_overloads_are_part_of_the_name(captured: Callable[[str], Program]) -> None:
    names = {op_name(n) for n in captured("conv1d").graph.nodes}
    assert {"aten.conv1d", "aten.conv1d.padding", "aten.mean.dim"} <= names


def test_arguments_by_schema_name_with_defaults(captured: Callable[[str], Program]) -> None:
    conv = next(n for n in captured("conv").graph.nodes if op_name(n) == "aten.conv2d")
    assert argument(conv, "stride") == [2, 2]
    assert argument(conv, "groups") == 1  # left at its default
    assert argument(conv, "bias") is None
    assert argument(conv, "no_such_argument") is None


def test_get_tensor_refuses_what_is_not_a_tensor(captured: Callable[[str], Program]) -> None:
    module = captured("mlp").graph_module
    assert get_tensor(module, "up.bias").shape == (20,)
    with pytest.raises(AttributeError):
        get_tensor(module, "up.nothing")
    with pytest.raises(AttributeError, match="is a Module, not a tensor"):
        get_tensor(module, "up")
