"""The ONNX report as a person reads it: sites that took the same form are one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .export import OnnxReport


def report_text(report: OnnxReport) -> str:
    """File, checks, then one line per form with its sites, bytes and reason; notes last."""
    where = " + external data" if report.external_data else ""
    stored = report.lowering.nbytes
    lines = [
        f"{report.path}{where}: {report.file_bytes / 1e6:.2f} MB on disk, {stored / 1e6:.2f} MB of weights reported, opset {report.opset}",
        f"ONNX Runtime: largest error {report.max_error:.1e} without optimizations, {report.fused_error:.1e} as it runs; {report.fused} MatMulNBits nodes",
        str(report.lowering),
        *(f"note: {note}" for note in report.notes),
        "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items()),
    ]
    return "\n".join(lines)
