"""Follow every node from one program to a later one through the journal of the passes in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .diff_snapshot import Snapshot, Symbols
from .errors import EditError
from .journal import Change, NodeRecord
from .program import Program


@dataclass(frozen=True)
class Trace:
    """One node's fate: its name before (None: added later), its name after (None: gone), and the edits in between."""

    before: str | None
    after: str | None
    steps: tuple[Change, ...] = ()


@dataclass
class _Track:
    origin: str | None
    current: str | None
    steps: list[Change]


def journal_between(original: Program, program: Program) -> Sequence[Change]:
    """The edits that lead from `original` to `program`; `EditError` when one is not a descendant of the other."""
    past, changes = original.journal.changes, program.journal.changes
    if changes[: len(past)] != past:
        raise EditError(
            f"diff from the journal: the original was edited {len(past)} times and the program's journal of {len(changes)} edits does not begin with these; "
            "compare the two with GraphDiff.between instead"
        )
    return changes[len(past) :]


def trace_journal(changes: Sequence[Change], before: Snapshot, after: Snapshot) -> list[Trace]:
    """Replay the journal, then reconcile it with both graphs: what no pass recorded (dead code, say) is still found."""
    replay = _Replay(before)
    for change in changes:
        replay.advance(_renamed(change, before.symbols))
    traces = [Trace(t.origin, t.current if _exists(t.current, after) else None, tuple(t.steps)) for t in replay.tracks]
    origins, currents = {t.before for t in traces}, {t.after for t in traces}
    traces += [Trace(n, n if n in after.nodes and n not in currents else None) for n in before.nodes if n not in origins]
    found = {t.after for t in traces}
    traces += [Trace(None, n) for n in after.nodes if n not in found]
    return [t for t in traces if t.before is not None or t.after is not None]


class _Replay:
    """Tracks of the nodes that edits touched; `live` finds a track by the node's present name."""

    def __init__(self, before: Snapshot) -> None:
        self.tracks: list[_Track] = []
        self._unclaimed = set(before.nodes)
        self._live: dict[str, _Track] = {}

    def advance(self, change: Change) -> None:
        """Apply one edit."""
        track = self._track(change)
        track.steps[-1:] = _merged(track.steps[-1:], change)
        track.current = change.after.name if change.after else None
        if track.current is not None:
            if (other := self._live.get(track.current)) is not None:
                other.current = None
            self._live[track.current] = track

    def _track(self, change: Change) -> _Track:
        name = change.before.name if change.before else ""
        if name in self._live:
            return self._live.pop(name)
        track = _Track(name if name in self._unclaimed else None, None, [])
        self._unclaimed.discard(name)
        self.tracks.append(track)
        return track


def _merged(last: list[Change], change: Change) -> list[Change]:
    """Edits that one pass made for one reason (a weight, then its bias) count as one."""
    if last and (last[0].pass_spec, last[0].action, last[0].why) == (change.pass_spec, change.action, change.why):
        return [replace(change, before=last[0].before, facts={**last[0].facts, **change.facts})]
    return [*last, change]


def _exists(name: str | None, after: Snapshot) -> bool:
    return name is not None and (name in after.nodes or name in after.reads)


def _renamed(change: Change, symbols: Symbols) -> Change:
    def rename(record: NodeRecord | None) -> NodeRecord | None:
        return replace(record, type=symbols(record.type)) if record else None

    return replace(change, before=rename(change.before), after=rename(change.after))
