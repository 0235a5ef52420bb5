"""Passes over the ONNX graph that change no value: tied weights stored once, dead nodes and duplicates out, metadata out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...ir.weights import storage_key

if TYPE_CHECKING:
    import onnx_ir


def share_tied(model: onnx_ir.Model) -> None:
    """Let initializers that are the same tensor (tied weights) be one."""
    import onnx_ir as ir

    first: dict[Any, onnx_ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, Tensor):
            continue
        key = (storage_key(raw), raw.storage_offset(), tuple(raw.shape), raw.stride(), raw.dtype)
        kept = first.setdefault(key, value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)


def clean_up(model: onnx_ir.Model) -> None:
    """Identities, repeated nodes, dead nodes, dead initializers, unused domains and the exporter's metadata."""
    from onnx_ir.passes import common

    common.InlinePass()(model)
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
