"""Compressed program to a program whose compressed linears are Triton kernels; whatever they do not take is decoded, and the report says why."""

from __future__ import annotations

import importlib.util

import torch

from ...ir.edit import Editor
from ...ir.errors import LowerError, MissingExtraError
from ...ir.nodes import argument, op_name
from ...ir.program import Program, Stage
from ...ir.sites import SiteKind, WeightSite
from ..reference import decode_sites
from ..target import Lowered, LoweringReport, No, SiteLowering, Support, Target, fast_path
from .cost import device_named, estimates
from .layout import TENSORS, Packed, Tile
from .operators import describe, linear
from .pack import pack
from .path import Stored, TritonPath

COMPUTED = (torch.float16, torch.bfloat16)


class Triton(Target[Program]):
    """Load as Sparse, Compute as Dense on CUDA GPUs from compute capability 8.0; float16 and bfloat16 linears.

    With `device` (such as `h100`) each weight takes the form that the cost model finds fastest there, or stays dense where none is faster; without, the
    form in which it is stored.
    """

    def __init__(self, *, device: str | None = None, tile: Tile | None = None) -> None:
        self.device, self.tile = None if device is None else device_named(device), tile or Tile()

    def supports(self, site: WeightSite) -> Support:
        """What the format's fast path says; only linears, and only in 16-bit floats."""
        path = _path(site)
        if path is None:
            return No(f"there is no fast path codegen/triton_target/{site.format.name}.py")
        if site.kind is not SiteKind.LINEAR:
            return No(f"{site.kind.value} weights have no kernel; only linears do")
        if site.dtype not in COMPUTED:
            return No(f"it computes in {site.dtype}; capture model.half() or model.bfloat16()")
        return path.supports(_stored(site))

    def lower(self, program: Program) -> Lowered[Program]:
        """A clone at stage LOWERED: compressed linears are `fxpress_triton::linear`, everything else a plain operator. Moves to a GPU with `.to("cuda")`."""
        if importlib.util.find_spec("triton") is None:
            raise MissingExtraError("triton", "triton", "lowering to Triton kernels")
        lowered = program.clone()
        formats = {s.name: s.format.to_spec() for s in program.sites()}
        refused: dict[str, str] = {}
        rows: dict[str, SiteLowering] = {}
        with Editor(lowered, "triton") as editor:
            for site in [s for s in lowered.sites() if s.compressed]:
                packed = self._packed(site)
                if isinstance(packed, No):
                    refused[site.name] = packed.reason
                    continue
                rows[site.name] = _row(site, packed)
                _swap(editor, site, packed)
            decode_sites(editor, [s for s in lowered.sites() if s.name in refused])
        lowered.stage = Stage.LOWERED
        for site in lowered.sites():
            rows[site.name] = _dense_row(site, formats, refused, next((t for t in site.tied if t in rows), None))
        return Lowered(lowered, LoweringReport(target=self.name, sites=tuple(rows[n] for n in formats), nbytes=lowered.nbytes))

    def _packed(self, site: WeightSite) -> Packed | No:
        """The site's weight for the kernels, or the reason why it is decoded."""
        answer = self.supports(site)
        if isinstance(answer, No):
            return answer
        path = _path(site)
        assert path is not None
        source, structure = path.source(_stored(site))
        if self.device is not None:
            best = estimates(source, self.device)[0]
            if best.speedup <= 1:
                return No(f"no form is faster than dense on {self.device.name}: {best.structure.value} would reach {best.speedup:.2f}x")
            structure = best.structure
        try:
            return pack(source, structure, self.tile)
        except LowerError as error:
            return No(str(error))


def _path(site: WeightSite) -> TritonPath | None:
    return fast_path(__package__, site.format.name, TritonPath)  # type: ignore[type-abstract]


def _stored(site: WeightSite) -> Stored:
    return Stored(format=site.format, payload=site.payload(), rows=site.rows, columns=site.columns, dtype=site.dtype)


def _swap(editor: Editor, site: WeightSite, packed: Packed) -> None:
    """Put the kernel's operator in the place of the site's."""
    stored = {f"packed_{name}": tensor for name, tensor in zip(TENSORS, packed.tensors, strict=True)}
    rest = (argument(site.node, "bias"), describe(packed), packed.rows)
    editor.lower(site, linear._opoverload, stored, rest, f"{packed.structure.value} tiles of {packed.values_kind.value} values")


def _row(site: WeightSite, packed: Packed) -> SiteLowering:
    bits = 8 * packed.nbytes / (packed.rows * packed.columns)
    form = f"fxpress_triton.linear ({packed.structure.value}, {packed.values_kind.value}, {packed.tile.rows}x{packed.tile.columns} tiles)"
    return SiteLowering(site=site.name, format=site.format.to_spec(), form=form, why=f"{bits:.2f} bits a weight travel", nbytes=packed.nbytes, fused=True)


def _dense_row(site: WeightSite, formats: dict[str, str], refused: dict[str, str], first: str | None) -> SiteLowering:
    """A site that stays plain; `first` is an earlier one with the same tensor, whose bytes count there."""
    why = f"decoded: {refused[site.name]}" if site.name in refused else "not compressed"
    why += f"; shares the tensor of {first}" if first else ""
    return SiteLowering(site=site.name, format=formats[site.name], form=op_name(site.node), why=why, nbytes=0 if first else site.nbytes)
