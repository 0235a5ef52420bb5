"""The ONNX report as a person reads it: sites that took the same form are one line."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from ..target import SiteLowering

if TYPE_CHECKING:
    from .export import OnnxReport


def report_text(report: OnnxReport) -> str:
    """File, checks, then one line per form with its sites, bytes and reason; notes last."""
    where = " + external data" if report.external_data else ""
    stored = report.lowering.nbytes
    lines = [
        f"{report.path}{where}: {report.file_bytes / 1e6:.2f} MB on disk, {stored / 1e6:.2f} MB of weights reported, opset {report.opset}",
        f"ONNX Runtime: largest error {report.max_error:.1e} without optimizations, {report.fused_error:.1e} as it runs; {report.fused} MatMulNBits nodes",
        *_forms(report.lowering.sites),
        *(f"note: {note}" for note in (*report.lowering.notes, *report.notes)),
        "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items()),
    ]
    return "\n".join(lines)


def _forms(sites: tuple[SiteLowering, ...]) -> list[str]:
    groups: dict[tuple[str, str, str], list[SiteLowering]] = defaultdict(list)
    for site in sites:
        groups[site.format, site.form, site.why].append(site)
    return [
        f"{len(members)} x {fmt} -> {form}, {sum(m.nbytes for m in members) / 1e6:.2f} MB ({why}): {_names(members)}"
        for (fmt, form, why), members in groups.items()
    ]


def _names(members: list[SiteLowering]) -> str:
    return ", ".join(m.site for m in members[:2]) + (", ..." if len(members) > 2 else "")
