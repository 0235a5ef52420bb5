"""The program as an ONNX graph with a `fxpress::Site` node where each compressed site stands, and no payload in it.

Payloads never travel through the exporter: the sites are emptied before the program is exported again, and filled in afterwards. The program is
already traced and decomposed, so both are skipped (most of torch.onnx's time) when every operator has a translation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...ir.edit import Editor
from ...ir.errors import LowerError
from ...ir.lifted import lifted
from ...ir.program import Program
from . import cached_attention, standard_attention
from .extras import quiet, require
from .translations import SYNONYMS, translations

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "fxpress"
WHY = "exporting to ONNX"


def export_skeleton(program: Program, opset: int, *, contrib: bool = False) -> onnx_ir.Model:
    """The ONNX graph of `program` at `opset`, each compressed site a node `fxpress::Site(data, bias)` whose attribute `name` is the site's."""
    empty = _emptied(program)
    with quiet():
        exported = lifted(empty)
        op = require("onnxscript", WHY).values.Opset("", opset)
        attention = cached_attention if contrib else standard_attention
        table = _sites() | attention.translation(op) | translations(exported.graph, op, opset)
        exported.run_decompositions = lambda *_: exported
        try:
            return _export(exported, opset, table)
        except torch.onnx.OnnxExporterError:
            pass
        try:
            return _export(empty.to_exported(), opset, table)
        except torch.onnx.OnnxExporterError as error:
            raise LowerError(
                f"torch.onnx cannot translate the program to opset {opset}: {_reason(error)}. Replace the operator named above in the model, "
                "or raise opset=; the full message is attached as the cause."
            ) from error


def _emptied(program: Program) -> Program:
    """A clone whose compressed sites hold no payload but their name, in place of the format, and whose operators translate well."""
    clone = program.clone()
    with Editor(clone, "onnx"):
        for site in clone.sites():
            if site.compressed:
                names = [a.name for a in site.node.target._schema.arguments]  # type: ignore[union-attr]
                emptied = dict(zip(names, site.node.args, strict=False)) | {"payload": [], "weight_format": site.name}
                site.node.args = tuple(emptied.values())
        for node in clone.graph.nodes:
            node.target = SYNONYMS.get(node.target, node.target)
    return clone


def _export(exported: torch.export.ExportedProgram, opset: int, table: dict[Any, Any]) -> onnx_ir.Model:
    done = torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False, opset_version=opset, custom_translation_table=table)
    assert done is not None
    return done.model


def _sites() -> dict[Any, Any]:
    """Translations of the fxpress operators to the placeholder node."""
    onnx, values = require("onnx", WHY), require("onnxscript", WHY).values
    schema_of = onnx.defs.OpSchema
    parameter, optional = schema_of.FormalParameter, schema_of.FormalParameterOption.Optional
    anything = [f"tensor({t})" for t in ("float", "float16", "double", "int32", "int64")]
    schema = schema_of(
        "Site", DOMAIN, 1,
        inputs=[parameter("data", "D"), parameter("bias", "T", param_option=optional)],
        outputs=[parameter("output", "T")],
        type_constraints=[("D", anything, ""), ("T", anything, "")],
        attributes=[schema_of.Attribute("name", schema_of.AttrType.STRING)],
    )  # fmt: skip
    op = values.Op(values.Opset(DOMAIN, 1), "Site", schema)

    def weighted(x: Any, payload: Any, bias: Any, weight_format: Any, *_: Any) -> Any:
        return op(x, bias, name=weight_format)

    def embedding(indices: Any, payload: Any, weight_format: Any, *_: Any) -> Any:
        return op(indices, None, name=weight_format)

    ops = torch.ops.fxpress
    return {ops.linear.default: weighted, ops.conv.default: weighted, ops.embedding.default: embedding}


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
