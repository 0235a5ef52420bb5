"""`GraphDiff`: what became of every node between two programs, which pass did it and why.

Two sources: the journal of the passes that lead from one program to the other (`from_journal`), or matching (`between`) for two programs without a common
past. Either way the graphs themselves have the last word: edits that nobody recorded are found, and a node that came back to what it was is not a change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from .diff_match import match
from .diff_snapshot import NodeView, Snapshot, Totals, same_weights, snapshot
from .diff_trace import Trace, journal_between, trace_journal
from .journal import Change
from .program import Program

SCHEMA_VERSION = 1


class Kind(Enum):
    """What became of a node, judged by its first and last state; a node may have passed through several edits."""

    REPLACED = "replaced"  # another operator or another weight format
    RETYPED = "retyped"  # same operator, other shape or dtype of its value or its weight
    REWEIGHTED = "reweighted"  # same types, other weight values
    REWIRED = "rewired"  # same node that reads other nodes, or has other constants
    ADDED = "added"
    REMOVED = "removed"
    UNCHANGED = "unchanged"

    @property
    def symbol(self) -> str:
        """One ASCII character for tables."""
        return {"replaced": "~", "retyped": ":", "reweighted": "*", "rewired": ">", "added": "+", "removed": "-", "unchanged": "="}[self.value]


class DiffSource(Enum):
    """How the nodes of the two programs were paired."""

    JOURNAL = "journal"
    MATCHING = "matching"


@dataclass(frozen=True, kw_only=True)
class NodeDiff:
    """One node before and after, with the edits in between in order. `before` is None for an added node, `after` for a removed one."""

    kind: Kind
    before: NodeView | None
    after: NodeView | None
    steps: tuple[Change, ...] = ()

    @property
    def view(self) -> NodeView:
        """The node after, or before when it is gone."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def name(self) -> str:
        """Name of the node after, or before when it is gone."""
        return self.view.name

    @property
    def module(self) -> str:
        """Module path of the node after, or before when it is gone."""
        return self.view.module

    @property
    def changed(self) -> bool:
        """Whether anything differs."""
        return self.kind is not Kind.UNCHANGED

    @property
    def passes(self) -> tuple[str, ...]:
        """Specs of the passes that touched the node, in order, each once."""
        return tuple(dict.fromkeys(s.pass_spec for s in self.steps))

    @property
    def bytes_before(self) -> int:
        """Bytes the node was the first to read."""
        return self.before.stored_bytes if self.before else 0

    @property
    def bytes_after(self) -> int:
        """Bytes the node is the first to read."""
        return self.after.stored_bytes if self.after else 0

    @property
    def note(self) -> str:
        """What no pass recorded about this node. Unchanged nodes have one too when they moved, or when their weight is no longer (or now) shared."""
        moved = f"was at {self.before.module or 'the root'}" if self.before and self.before.module != self.module else ""
        if not self.changed and self.bytes_before != self.bytes_after:
            return "; ".join(filter(None, (moved, self._note_on_sharing())))
        return moved or ("" if self.steps or not self.changed else self._note_on_cause())

    def _note_on_cause(self) -> str:
        if self.kind is Kind.REWEIGHTED and self.view.tied:
            return f"shares its weight with {', '.join(self.view.tied)}"
        return "follows from other changes" if self.kind in (Kind.REWIRED, Kind.RETYPED) else ""

    def _note_on_sharing(self) -> str:
        tied = self.before.tied if self.before and self.before.shared else self.view.tied
        if self.bytes_after > self.bytes_before:
            return f"no longer shares its weight with {', '.join(tied) or 'an earlier node'}"
        return f"now shares its weight with {', '.join(tied) or 'an earlier node'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sides = {side: view and asdict(view) for side, view in (("before", self.before), ("after", self.after))}
        facts = {"kind": self.kind.value, "module": self.module, "name": self.name, **sides, "steps": [s.to_dict() for s in self.steps], "note": self.note}
        return dict(json_safe(facts))


@dataclass(frozen=True, kw_only=True)
class GraphDiff:
    """All nodes of both programs in graph order, removed ones where they stood."""

    entries: tuple[NodeDiff, ...]
    before: Totals
    after: Totals
    source: DiffSource
    passes: tuple[str, ...] = ()  # specs in order of their first edit

    @staticmethod
    def from_journal(original: Program, program: Program) -> GraphDiff:
        """What the passes did that lead from `original` to `program`; `EditError` when the journals say it is no descendant."""
        changes = journal_between(original, program)
        before, after = snapshot(original), snapshot(program)
        passes = tuple(dict.fromkeys(c.pass_spec for c in changes))
        return _assemble(trace_journal(changes, before, after), before, after, DiffSource.JOURNAL, passes)

    @staticmethod
    def between(a: Program, b: Program) -> GraphDiff:
        """The difference of two programs without a common past, paired by weights, module paths, operators and neighbourhood."""
        before, after = snapshot(a), snapshot(b)
        pairs = match(before, after)
        partners = set(pairs.values())
        traces = [*(Trace(n, pairs.get(n)) for n in before.nodes), *(Trace(None, n) for n in after.nodes if n not in partners)]
        return _assemble(traces, before, after, DiffSource.MATCHING)

    @property
    def changed(self) -> tuple[NodeDiff, ...]:
        """The entries that differ."""
        return tuple(e for e in self.entries if e.changed)

    @property
    def is_empty(self) -> bool:
        """Whether nothing differs."""
        return not self.changed

    @cached_property
    def counts(self) -> Mapping[Kind, int]:
        """Number of nodes of every kind, zeros included."""
        return {kind: sum(e.kind is kind for e in self.entries) for kind in Kind}

    @cached_property
    def touched(self) -> Mapping[str, int]:
        """Number of nodes every pass touched."""
        return {spec: sum(spec in e.passes for e in self.entries) for spec in self.passes}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, under a schema version. Numbers that JSON lacks (NaN, infinity) become text."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source.value,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "counts": {k.value: n for k, n in self.counts.items()},
            "passes": [{"spec": spec, "nodes": nodes} for spec, nodes in self.touched.items()],
            "entries": [e.to_dict() for e in self.entries],
        }

    def to_text(self, *, max_rows: int = 60, color: bool = False) -> str:
        """The changes as a table for a terminal, equal blocks folded into `model.layers.[0-29].mlp.down_proj`; at most `max_rows` rows."""
        from .diff_text import diff_text

        return diff_text(self, max_rows=max_rows, color=color)

    def to_html(self, path: str | Path | None = None, *, title: str = "Graph diff") -> str:
        """One self-contained page (no network), also written to `path` when given."""
        from .diff_html import diff_html, write_html

        page = diff_html(self, title=title)
        if path is not None:
            write_html(page, Path(path))
        return page


def _assemble(traces: Sequence[Trace], before: Snapshot, after: Snapshot, source: DiffSource, passes: tuple[str, ...] = ()) -> GraphDiff:
    partners = {t.before: t.after for t in traces if t.before is not None and t.after is not None}
    entries = [_entry(t, before, after, partners) for t in traces]
    ordered = tuple(_in_graph_order(entries, before, after))
    return GraphDiff(entries=ordered, before=before.totals, after=after.totals, source=source, passes=passes)


def _entry(trace: Trace, before: Snapshot, after: Snapshot, partners: Mapping[str, str]) -> NodeDiff:
    old = before.nodes.get(trace.before) if trace.before is not None else None
    new = after.nodes.get(trace.after) or _weight_read(trace) if trace.after is not None else None
    if old is None or new is None:
        kind = Kind.ADDED if old is None else Kind.REMOVED
    elif (old.op, old.format) != (new.op, new.format):
        kind = Kind.REPLACED
    elif (old.type, old.weight) != (new.type, new.weight):
        kind = Kind.RETYPED
    elif trace.steps or not same_weights(before.tensors[old.name], after.tensors[new.name]):
        kind = Kind.REWEIGHTED
    else:
        rewired = (tuple(partners.get(n, "") for n in old.inputs), old.constants) != (new.inputs, new.constants)
        kind = Kind.REWIRED if rewired else Kind.UNCHANGED
    return NodeDiff(kind=kind, before=old, after=new, steps=trace.steps)


def _weight_read(trace: Trace) -> NodeView:
    """View of a recorded weight read: these are no nodes of a snapshot."""
    record = next(s.after for s in reversed(trace.steps) if s.after is not None)
    return NodeView(**vars(record))


def _in_graph_order(entries: list[NodeDiff], before: Snapshot, after: Snapshot) -> Iterator[NodeDiff]:
    """The later graph's order; a removed node follows whatever it stood behind."""
    order_before = {n: i for i, n in enumerate(before.nodes)}
    order_after = {n: i for i, n in enumerate(after.nodes)}
    gone = sorted((e for e in entries if e.after is None), key=lambda e: order_before[e.name], reverse=True)
    for entry in sorted((e for e in entries if e.after is not None), key=lambda e: order_after.get(e.name, -1)):
        while gone and entry.before is not None and order_before[gone[-1].name] < order_before[entry.before.name]:
            yield gone.pop()
        yield entry
    yield from reversed(gone)


def json_safe(value: Any) -> Any:
    """Plain data as JSON can hold it: lists for tuples, text for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
