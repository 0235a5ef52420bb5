"""Fold equal changes in repeated blocks: thirty times `model.layers.<i>.mlp.down_proj` become one row with the path `model.layers.[0-29].mlp.down_proj`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from .diff import NodeDiff
from .diff_snapshot import NodeView

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")

Indices = tuple[int, ...]
Box = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Fold:
    """Entries that differ only in where they stand. `path` carries index ranges such as `[0-2,5]`."""

    path: str
    entries: tuple[NodeDiff, ...]

    @property
    def first(self) -> NodeDiff:
        """The entry that stands for all."""
        return self.entries[0]

    @property
    def bytes_before(self) -> int:
        """Sum over the entries."""
        return sum(e.bytes_before for e in self.entries)

    @property
    def bytes_after(self) -> int:
        """Sum over the entries."""
        return sum(e.bytes_after for e in self.entries)

    @property
    def note(self) -> str:
        """The entries' note, with `*` for numbers where they differ."""
        return _common([e.note for e in self.entries])

    def reason(self, step: int) -> str:
        """Why of one step, with `*` for numbers where the entries differ."""
        return _common([e.steps[step].why for e in self.entries])

    def facts(self, step: int) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of every fact of one step."""
        values: dict[str, list[float]] = defaultdict(list)
        for entry in self.entries:
            for key, value in entry.steps[step].facts.items():
                values[key].append(value)
        return {key: (min(v), max(v)) for key, v in values.items()}


def fold(entries: Iterable[NodeDiff]) -> tuple[Fold, ...]:
    """Rows in order of their first entry."""
    groups: dict[Hashable, dict[Indices, list[NodeDiff]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        pattern, indices = _split(entry.module)
        groups[pattern, fold_key(entry)][indices].append(entry)
    position = {id(e): i for i, e in enumerate(e for g in groups.values() for es in g.values() for e in es)}
    folds = [f for group in groups.values() for f in _fold_group(group)]
    return tuple(sorted(folds, key=lambda f: position[id(f.first)]))


def fold_key(entry: NodeDiff) -> Hashable:
    """Equal for entries that tell the same story, whatever their names, module indices and measured facts."""
    steps = tuple((s.pass_spec, s.action, _NUMBER.sub("*", s.why), tuple(s.facts)) for s in entry.steps)
    return entry.kind, _look(entry.before), _look(entry.after), steps, _NUMBER.sub("*", entry.note)


def _common(texts: Sequence[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else _NUMBER.sub("*", texts[0])


def _look(view: NodeView | None) -> Hashable:
    return view and (view.op, view.type, view.weight, view.format, view.stored_bytes, view.shared)


def _split(path: str) -> tuple[Hashable, Indices]:
    """The path with its whole-number parts cut out, and these numbers."""
    parts = path.split(".")
    return tuple(None if p.isdecimal() else p for p in parts), tuple(int(p) for p in parts if p.isdecimal())


def _fold_group(group: dict[Indices, list[NodeDiff]]) -> list[Fold]:
    folds = []
    for box in _boxes(list(group)):
        entries = [e for indices in product(*box) for e in group[indices]]
        ranges = iter([_range(axis) for axis in box])
        path = ".".join(next(ranges) if part.isdecimal() else part for part in entries[0].module.split("."))
        folds.append(Fold(path, tuple(entries)))
    return folds


def _boxes(points: Sequence[Indices]) -> list[Box]:
    """Cover the points by products of index sets, none counted twice."""
    if not points or not points[0]:
        return [()] if points else []
    rests: dict[int, list[Indices]] = defaultdict(list)
    for first, *rest in points:
        rests[first].append(tuple(rest))
    firsts: dict[frozenset[Indices], list[int]] = defaultdict(list)
    for first, tails in rests.items():
        firsts[frozenset(tails)].append(first)
    return [(tuple(sorted(fs)), *box) for tails, fs in firsts.items() for box in _boxes(sorted(tails))]


def _range(numbers: Sequence[int]) -> str:
    """`[0-2,5]`; a single number stands alone, a long list is cut."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    return f"[{','.join(texts if len(texts) <= 6 else [*texts[:4], '..', texts[-1]])}]"
