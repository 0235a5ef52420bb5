"""The reference target: every compressed weight decoded once, plain ATen operators. The oracle of all other targets."""

from __future__ import annotations

from ..ir.edit import Editor
from ..ir.nodes import argument, get_tensor, op_name
from ..ir.program import Program, Stage
from ..ir.sites import WeightSite
from ..ir.weights import storage_key
from .target import Lowered, LoweringReport, No, SiteLowering, Support, Target, Yes


class Reference(Target[Program]):
    """Decode and run in plain torch: dense speed and dense memory, exact semantics."""

    def supports(self, site: WeightSite) -> Support:
        """Dense weights stay; everything else is decoded."""
        return No(f"the reference target decodes {site.format.name} weights") if site.compressed else Yes()

    def lower(self, program: Program) -> Lowered[Program]:
        """A clone at stage LOWERED whose sites are plain operators; sites that share a payload share the decoded weight."""
        lowered = program.clone()
        formats = {s.name: s.format.to_spec() for s in program.sites()}
        with Editor(lowered, "reference") as editor:
            decode_sites(editor, [s for s in lowered.sites() if s.compressed])
        lowered.stage = Stage.LOWERED
        rows = tuple(_row(s, formats.get(s.name, "dense")) for s in lowered.sites())
        return Lowered(lowered, LoweringReport(target=self.name, sites=rows, nbytes=lowered.nbytes))


def decode_sites(editor: Editor, sites: list[WeightSite]) -> None:
    """Replace compressed `sites` by plain operators; payloads that share storage are decoded once."""
    decoded: dict[tuple[object, ...], str] = {}
    for site in sites:
        key = (*(storage_key(t) for t in site.payload().values()), site.shape, site.dtype)
        node = editor.decompress(site, "decoded by the reference target")
        name = str(argument(node, "weight").target)
        if key in decoded:
            editor.set_tensor(name, get_tensor(editor.program.graph_module, decoded[key]))
        decoded.setdefault(key, name)


def _row(site: WeightSite, format_spec: str) -> SiteLowering:
    why = "decoded once" if format_spec != site.format.to_spec() else "not compressed"
    return SiteLowering(site=site.name, format=format_spec, form=op_name(site.node), why=why, nbytes=site.nbytes)
