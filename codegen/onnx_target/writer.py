"""Writes nodes and initializers into an ONNX graph at a place, storing every tensor once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...ir.formats.bitpack import pack

if TYPE_CHECKING:
    import onnx_ir


class Writer:
    """Inserts nodes before `place`. Tensors written under an equal key are stored once; `written` sums the bytes of new ones.

    `products`: the MatMul of every site whose low-bit weight ONNX Runtime can fuse with it. `contrib`: the file may hold ONNX Runtime's own operators.
    """

    def __init__(self, graph: onnx_ir.Graph, opset: int, *, contrib: bool = False) -> None:
        self.graph = graph
        self.opset = opset
        self.contrib = contrib
        self.place: onnx_ir.Node | None = None
        self.written = 0
        self.products: dict[onnx_ir.Node, str] = {}
        self._stored: dict[Any, onnx_ir.Value] = {}

    def op(self, op_type: str, *inputs: onnx_ir.Value | None, domain: str = "", **attributes: Any) -> onnx_ir.Value:
        """Insert a node, of the standard domain if none is given, before `place`; returns its output."""
        import onnx_ir as ir

        given = {k: v for k, v in attributes.items() if v is not None}
        node = ir.node(op_type, inputs=list(inputs), attributes=given, domain=domain)
        assert self.place is not None
        self.graph.insert_before(self.place, node)
        return node.outputs[0]

    def tensor(self, name: str, tensor: Tensor, key: Any) -> onnx_ir.Value:
        """Store `tensor` as it is under `name`, unless something with an equal `key` is stored already."""
        from onnx_ir import tensor_adapters

        if key not in self._stored:
            self._register(key, tensor_adapters.TorchTensor(tensor.contiguous(), name=self._free(name)))
        return self._stored[key]

    def integers(self, name: str, codes: Tensor, bits: int, signed: bool, key: Any) -> onnx_ir.Value:
        """Store `codes: uint8, any shape` (negative ones modulo `2^bits`) as 2, 4 or 8-bit integers, packed low bits first over the flattened tensor."""
        import onnx_ir as ir

        if key not in self._stored:
            kind, shape = ir.DataType[f"{'' if signed else 'U'}INT{bits}"], tuple(codes.shape)
            packed = pack(codes.flatten(), bits).numpy()
            if bits == 8:
                array = packed.view("int8" if signed else "uint8").reshape(shape)
                self._register(key, ir.Tensor(array, dtype=kind, shape=ir.Shape(shape), name=self._free(name)))
            else:
                self._register(key, ir.PackedTensor(packed, kind, shape=shape, name=self._free(name)))
        return self._stored[key]

    def constant(self, values: Tensor) -> onnx_ir.Value:
        """Store small values once per distinct content."""
        return self.tensor("fxpress.constant", values, (values.dtype, tuple(values.shape), values.numpy().tobytes()))

    def numbers(self, *values: int) -> onnx_ir.Value:
        """A constant `[n] int64`: shapes and axes."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def _register(self, key: Any, tensor: Any) -> None:
        import onnx_ir as ir

        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self._stored[key] = value
        self.written += tensor.nbytes

    def _free(self, name: str) -> str:
        names = (f"{name}#{i}" if i else name for i in range(len(self.graph.initializers) + 1))
        return next(n for n in names if n not in self.graph.initializers)
