"""What a person reads after a run: one table of passes, the reasons for what was left out, and the totals."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence

from ..ir.program import Program
from ..passes.base import PassReport
from .measure import bits_per_weight


def sparsity(program: Program) -> float:
    """Fraction of exact zeros over the weights of all sites."""
    zeros = total = 0
    for site in program.sites():
        zeros, total = zeros + int((site.matrix() == 0).sum()), total + site.parameters
    return zeros / max(1, total)


def summary_text(program: Program, reports: Sequence[PassReport], bytes_before: int, width: int | None = None) -> str:
    """The summary as plain text; `width` defaults to the terminal's."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="fxpress: what each pass did", title_justify="left")
    for column in ("pass", "taken", "skipped", "MB before", "MB after", "weight err", "output err", "seconds"):
        table.add_column(column, justify="left" if column == "pass" else "right", overflow="fold")
    for r in reports:
        errors = [_mean(r, name) for name in ("relative_error", "output_error")]
        sizes = [f"{b / 1e6:.2f}" for b in (r.bytes_before, r.bytes_after)]
        table.add_row(Text(r.pass_spec), str(len(r.taken)), str(len(r.skipped)), *sizes, *errors, f"{r.seconds:.1f}")
    console = Console(file=io.StringIO(), width=width or max(100, shutil.get_terminal_size((120, 24)).columns))
    console.print(table)
    for line in _lines(program, reports, bytes_before):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def _mean(report: PassReport, fact: str) -> str:
    values = [t.facts[fact] for t in report.taken if fact in t.facts]
    return f"{sum(values) / len(values):.4f}" if values else "-"


def _lines(program: Program, reports: Sequence[PassReport], bytes_before: int) -> list[str]:
    lines = []
    for r in reports:
        lines += [f"note ({r.pass_spec}): {note}" for note in r.notes]
        lines += [f"skipped by {r.pass_spec}: {text}" for text in skip_reasons(r)]
    ratio = bytes_before / max(1, program.nbytes)
    lines.append(
        f"total: {bytes_before / 1e6:.2f} MB -> {program.nbytes / 1e6:.2f} MB ({ratio:.2f}x smaller), {bits_per_weight(program):.2f} bits per weight over "
        f"{len(program.sites())} sites, everything counted"
    )
    return lines


def skip_reasons(report: PassReport) -> list[str]:
    """One line per reason: how many sites, and which (the first three)."""
    reasons: dict[str, list[str]] = {}
    for skip in report.skipped:
        reasons.setdefault(skip.why, []).append(skip.site)
    return [f"{len(s)} x {why}: {', '.join(s[:3])}{', ...' if len(s) > 3 else ''}" for why, s in reasons.items()]
