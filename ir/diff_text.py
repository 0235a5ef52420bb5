"""`GraphDiff` as a table for a terminal: one row a change, equal blocks folded, every pass named below the row, totals at the end."""

from __future__ import annotations

from .diff import DiffSource, GraphDiff, Kind, NodeDiff
from .diff_fold import Fold, fold
from .diff_snapshot import NodeView

_COLORS = {Kind.ADDED: "32", Kind.REMOVED: "31", Kind.REPLACED: "33", Kind.RETYPED: "36", Kind.REWEIGHTED: "35", Kind.REWIRED: "34"}
_PATH_WIDTH = 64


def diff_text(diff: GraphDiff, *, max_rows: int, color: bool) -> str:
    """The whole table; see `GraphDiff.to_text`."""
    rows = fold(e for e in diff.entries if e.changed or e.note)
    shown = rows[: max(0, max_rows)]
    width = min(_PATH_WIDTH, max((len(_where(r)) for r in shown), default=0))
    lines = [line for row in shown for line in _row_lines(row, width, color)]
    if len(rows) > len(shown):
        hidden = sum(len(r.entries) for r in rows[len(shown) :])
        lines.append(f"... {len(rows) - len(shown)} more rows ({hidden} nodes); raise max_rows to see them")
    return "\n".join([_heading(diff), "", *lines, *([""] if lines else []), *_totals(diff)]) + "\n"


def _heading(diff: GraphDiff) -> str:
    source = "from the journal" if diff.source is DiffSource.JOURNAL else "by matching"
    return f"graph diff ({source}): " + ("no node changed" if diff.is_empty else _count(len(diff.changed), "node changed", "nodes changed"))


def _row_lines(row: Fold, width: int, color: bool) -> list[str]:
    """Where and how large; what; which passes and why."""
    times = f"x{len(row.entries)}" if len(row.entries) > 1 else ""
    kind = _paint(f"{row.first.kind.value:<10}", row.first.kind, color)
    head = f"{row.first.kind.symbol} {_where(row):<{width}} {times:>5}  {kind}  {_bytes_change(row.bytes_before, row.bytes_after)}"
    return [line.rstrip() for line in (head, f"      {_what(row.first)}", *_step_lines(row))]


def _where(row: Fold) -> str:
    """Path, or the node's name at the root."""
    return row.path or row.first.name


def _what(entry: NodeDiff) -> str:
    """Operator and shapes, with `before -> after` where they differ."""
    old, new = entry.before or entry.view, entry.after or entry.view
    parts = [_arrow(old.op, new.op), _arrow(old.type, new.type)]
    parts += [f"weight {_arrow(old.weight, new.weight)}"] if old.weight or new.weight else []
    parts += [_arrow(old.format, new.format)]
    return "  ".join([p for p in parts if p] + _rewiring(old, new, entry.kind))


def _rewiring(old: NodeView, new: NodeView, kind: Kind) -> list[str]:
    if kind is not Kind.REWIRED:
        return []
    reads = [f"reads {_arrow(', '.join(old.inputs), ', '.join(new.inputs))}"] if old.inputs != new.inputs else []
    return reads + ([_arrow(f"({old.constants})", f"({new.constants})")] if old.constants != new.constants else [])


def _arrow(before: str, after: str) -> str:
    return after if before == after else f"{before or 'none'} -> {after or 'none'}"


def _step_lines(row: Fold) -> list[str]:
    steps = row.first.steps
    lines = []
    for i, step in enumerate(steps):
        number = f"{i + 1}. " if len(steps) > 1 else ""
        facts = ", ".join(f"{key} {_span(*span)}" for key, span in row.facts(i).items())
        lines.append(f"      {number}{step.pass_spec}: {row.reason(i)}" + (f"  ({facts})" if facts else ""))
    return lines + ([f"      {row.note}"] if row.note else [])


def _span(low: float, high: float) -> str:
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}..{high:.4g}"


def _totals(diff: GraphDiff) -> list[str]:
    counts = ", ".join(f"{n} {kind.value}" for kind, n in diff.counts.items() if n)
    before, after = diff.before, diff.after
    lines = [
        f"nodes       {before.nodes:,} -> {after.nodes:,}  ({counts})",
        f"parameters  {before.parameters:,} -> {after.parameters:,}{_percent(before.parameters, after.parameters)}",
        f"bytes       {_bytes_change(before.nbytes, after.nbytes) or human_bytes(after.nbytes)}",
    ]
    return lines + [f"pass        {spec}: {_count(nodes, 'node', 'nodes')}" for spec, nodes in diff.touched.items()]


def _bytes_change(before: int, after: int) -> str:
    return "" if before == after else f"{human_bytes(before)} -> {human_bytes(after)}{_percent(before, after)}"


def _percent(before: int, after: int) -> str:
    return f"  ({100 * (after - before) / before:+.1f} %)" if before and before != after else ""


def human_bytes(count: int) -> str:
    """Bytes in decimal units: `538.1 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def human_count(count: int) -> str:
    """A count in thousands, millions or billions: `134.5 M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{count:,}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _paint(text: str, kind: Kind, color: bool) -> str:
    return f"\x1b[{_COLORS[kind]}m{text}\x1b[0m" if color and kind in _COLORS else text
