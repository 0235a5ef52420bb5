"""Several ONNX graphs over one data file: weights of smaller models that are the first rows of a larger one's are ranges of its bytes.

ONNX Runtime maps external data into memory, so with prepacking off models in one process share what they share on disk. A runtime width input with a `Slice`
of the weights would copy them in every run instead (docs/passes/nest.md has both, measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import onnx_ir

INLINE = 1024  # bytes up to which a tensor stays in its graph
PAGE, LINE = 4096, 64  # what large and small tensors begin at, for mapping
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Shared:
    """Bytes of the data file, and bytes that a file for each model would hold."""

    stored: int
    apart: int


def share(models: Sequence[onnx_ir.Model], data: Path) -> Shared:
    """Move the initializers of all models into the new file `data`, in the folder the models will be saved to; the first model is the largest.

    Weights that a smaller model has the first columns of are stored transposed, in all models, so that its part is one range of bytes.
    """
    turned = _columns_cut(models)
    for model in models:
        for name in list(model.graph.initializers):
            _lay(model, name, turned=name in turned)
    placed: dict[str, tuple[Any, int]] = {}
    apart = 0
    with data.open("wb") as file:
        for model in models:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.nbytes <= INLINE:
                    continue
                apart += tensor.nbytes
                offset = _same_start(placed.get(name), tensor)
                if offset is None:
                    offset = _append(file, tensor)
                    placed.setdefault(name, (tensor, offset))
                value.const_value = _external(data, offset, tensor, name)
        return Shared(file.tell(), apart)


def _columns_cut(models: Sequence[onnx_ir.Model]) -> set[str]:
    """Names of matrices of which some model holds the first columns only, and that nothing but products reads."""
    shapes = [{n: tuple(v.const_value.shape.numpy()) for n, v in m.graph.initializers.items() if v.const_value is not None} for m in models]
    return {
        name for name, full in shapes[0].items()
        if len(full) == 2 and all(len(s.get(name, ())) == 2 for s in shapes) and all(_products(m, name) for m in models)
        and all(s[name][0] == full[0] for s in shapes) and any(s[name][1] < full[1] for s in shapes)
    }  # fmt: skip


def _products(model: onnx_ir.Model, name: str) -> list[tuple[onnx_ir.Node, bool]]:
    """Float products that take the matrix as their second factor, and whether transposed; none if anything else reads it."""
    import onnx_ir as ir

    found: list[tuple[onnx_ir.Node, bool]] = []
    value = model.graph.initializers[name]
    if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT or len(value.const_value.shape) != 2:
        return []
    for node, place in value.uses():
        inner = [(u, p) for u, p in node.outputs[0].uses()] if node.op_type == "Transpose" else []
        if inner and all(u.op_type == "MatMul" and p == 1 for u, p in inner):
            found += [(u, True) for u, _ in inner]
        elif node.op_type in ("MatMul", "Gemm") and node.domain == "" and place == 1:
            found.append((node, "transB" in node.attributes and bool(node.attributes["transB"].as_int())))
        else:
            return []
    return found


def _lay(model: onnx_ir.Model, name: str, *, turned: bool) -> None:
    """Let products read the stored matrix itself, transposed or not: a `Transpose` in the graph would be carried out, into a copy, at load.

    `turned`: store it the other way round.
    """
    import onnx_ir as ir

    products, value = _products(model, name), model.graph.initializers[name]
    for node, transposed in products:
        flag, old = int(transposed != turned), node.inputs[1]
        node.replace_input_with(1, value)
        if old is not value and old is not None and not old.uses():
            model.graph.remove(old.producer(), safe=True)
        if node.op_type == "Gemm" or flag:
            node.attributes["transB"] = ir.AttrInt64("transB", flag)
        if node.op_type == "MatMul" and flag:
            node.op_type, node.domain = "FusedMatMul", CONTRIB
            model.opset_imports[CONTRIB] = 1
    if turned and value.const_value is not None:
        stored = ir.Tensor(value.const_value.numpy().T.copy(), name=name)
        value.const_value, value.shape = stored, stored.shape


def _same_start(known: tuple[Any, int] | None, tensor: Any) -> int | None:
    """Where the tensor's bytes lie already: at the start of those of the first tensor of its name."""
    if known is None or known[0].dtype != tensor.dtype or tuple(known[0].shape)[1:] != tuple(tensor.shape)[1:]:
        return None
    mine = tensor.tobytes()
    return known[1] if known[0].tobytes()[: len(mine)] == mine else None


def _append(file: BinaryIO, tensor: Any) -> int:
    file.write(b"\0" * (-file.tell() % (PAGE if tensor.nbytes >= PAGE else LINE)))
    offset = file.tell()
    file.write(tensor.tobytes())
    return offset


def _external(data: Path, offset: int, tensor: Any, name: str) -> onnx_ir.ExternalTensor:
    import onnx_ir as ir

    return ir.ExternalTensor(data.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=str(data.parent))
