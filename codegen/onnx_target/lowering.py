"""Compressed program to ONNX model in memory: skeleton, sites filled in by the fast paths, clean-up, report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...ir.edit import Editor
from ...ir.errors import LowerError
from ...ir.nodes import node_type, op_name
from ...ir.program import Program
from ...ir.sites import WeightSite
from ..reference import decode_sites
from ..target import Lowered, LoweringReport, No, SiteLowering, Support, Target, fast_path
from .cached_attention import CACHE_PROPERTY, IN_PLACE, with_cached_attention
from .cleanup import clean_up, initializer_bytes
from .extras import require
from .masks import mask_notes, without_masks
from .path import LOWEST_OPSET, OnnxPath, Slot
from .products import merge_products
from .shared_data import CONTRIB
from .signature import apply_signature
from .skeleton import DOMAIN, WHY, export_skeleton
from .standard_attention import LAST_STANDARD_OPSET, STANDARD_OPSET
from .writer import Writer

if TYPE_CHECKING:
    import onnx_ir


class Onnx(Target["onnx_ir.Model"]):
    """ONNX at `opset` (None: the lowest that holds the weights, 21, or 25 for 2-bit linears).

    Attention over caches becomes ONNX Runtime's own operator, or standard ones if `portable`. `merge`: low-bit weights that read one input are one product.
    """

    def __init__(self, *, opset: int | None = None, portable: bool = False, merge: bool = False) -> None:
        self.opset, self.portable, self.merge = opset, portable, merge

    def supports(self, site: WeightSite) -> Support:
        """What the format's fast path says; a format without one is decoded."""
        path = _path(site)
        if path is None:
            return No(f"there is no fast path codegen/onnx_target/{site.format.name}.py")
        return path.supports(site)

    def lower(self, program: Program) -> Lowered[onnx_ir.Model]:
        """An `onnx_ir.Model` whose initializers are the stored low-bit tensors; nothing is written to disk."""
        helper = require("onnx", WHY).helper
        _refuse_bfloat16(program)
        formats = {s.name: s.format.to_spec() for s in program.sites()}
        program = without_masks(program)
        refused = {s.name: r.reason for s in program.sites() if s.compressed and isinstance(r := self.supports(s), No)}
        decoded = _decoded(program, set(refused)) if refused else program
        in_place, contrib = False, bool(program.inputs.caches) and not self.portable
        opset, notes = self._opset(decoded), mask_notes(formats.values())
        if contrib or (program.inputs.caches and opset >= STANDARD_OPSET):
            decoded, left = with_cached_attention(decoded, contrib=contrib)
            notes += left
            in_place = contrib and not left
        model = export_skeleton(decoded, opset, contrib=contrib)
        writer = Writer(model.graph, opset, contrib=contrib)
        rows = _fill(model, decoded, writer) | _dense_rows(decoded, formats, refused)
        if self.merge:
            joined = merge_products(model, writer.products)
            rows |= {n: replace(rows[n], fused=False, form=f"{rows[n].form}, in the product of another site") for n in joined}
        model.opset_imports.setdefault(CONTRIB, 1)  # taken out again where nothing uses it
        clean_up(model, contrib=contrib)
        apply_signature(decoded, model)
        if in_place:
            model.metadata_props[CACHE_PROPERTY] = IN_PLACE
        model.ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
        sites = tuple(replace(rows[n], format=formats[n]) for n in formats)
        return Lowered(model, LoweringReport(target=self.name, sites=sites, nbytes=initializer_bytes(model), notes=notes))

    def _opset(self, program: Program) -> int:
        if self.opset is not None and self.opset < LOWEST_OPSET:
            raise LowerError(f"opset={self.opset}: block-wise DequantizeLinear needs opset >= {LOWEST_OPSET}; raise it or leave it out")
        if self.portable and program.inputs.caches and (self.opset or 0) > LAST_STANDARD_OPSET:
            raise LowerError(f"opset={self.opset}: portable attention is written up to opset {LAST_STANDARD_OPSET}; lower it or leave it out")
        lowest = STANDARD_OPSET if self.portable and program.inputs.caches else LOWEST_OPSET
        return self.opset or max([lowest, *(path.opset(s) for s in program.sites() if s.compressed and (path := _path(s)))])


def _path(site: WeightSite) -> OnnxPath | None:
    return fast_path(__package__, site.format.name, OnnxPath)  # type: ignore[type-abstract]


def _refuse_bfloat16(program: Program) -> None:
    """ONNX Runtime's CPU provider has no bfloat16 kernels for MatMul, Add and most others."""
    for node in program.graph.nodes:
        found = node_type(node)
        if node.op != "get_attr" and found is not None and found.dtype is torch.bfloat16:
            raise LowerError(
                f"{node.name} ({op_name(node)}) computes in bfloat16, for which ONNX Runtime's CPU provider has no kernels; "
                "expected float32 or float16: capture model.float() (compressed weights stay as small)"
            )


def _decoded(program: Program, names: set[str]) -> Program:
    """A clone in which the sites in `names` are dense."""
    clone = program.clone()
    with Editor(clone, "onnx") as editor:
        decode_sites(editor, [s for s in clone.sites() if s.name in names])
    return clone


def _fill(model: onnx_ir.Model, program: Program, writer: Writer) -> dict[str, SiteLowering]:
    """Replace every placeholder by what its fast path writes."""
    import onnx_ir as ir

    sites = {s.name: s for s in program.sites()}
    rows = {}
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        site = sites[node.attributes["name"].as_string()]
        path, data = _path(site), node.inputs[0]
        assert path is not None and data is not None
        writer.place, before = node, writer.written
        old = node.outputs[0]
        form = path.emit(Slot(site, data, node.inputs[1] if len(node.inputs) > 1 else None, tuple(old.consumers()), tuple(sites[t] for t in site.tied), writer))
        form.output.name, form.output.type, form.output.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, form.output, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        rows[site.name] = SiteLowering(
            site=site.name, format=site.format.to_spec(), form=form.text, why=form.why, nbytes=writer.written - before, fused=form.fused
        )
    return rows


def _dense_rows(program: Program, formats: dict[str, str], refused: dict[str, str]) -> dict[str, SiteLowering]:
    """Rows of the sites that are dense in the file; a tied weight counts at its first site."""
    rows: dict[str, SiteLowering] = {}
    for site in program.sites():
        if site.compressed:
            continue
        first = next((t for t in site.tied if t in rows), None)
        why = f"decoded: {refused[site.name]}" if site.name in refused else "not compressed"
        why += f"; shares the tensor of {first}" if first else ""
        form = f"{op_name(site.node)} on {str(site.dtype).removeprefix('torch.')}"
        rows[site.name] = SiteLowering(site=site.name, format=formats[site.name], form=form, why=why, nbytes=0 if first else site.nbytes)
    return rows
