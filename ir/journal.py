"""The record of every edit: which pass changed which node into what, and why. `GraphDiff` is read off it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Action(Enum):
    """What an edit did to a node."""

    ADDED = "added"
    REMOVED = "removed"
    REPLACED = "replaced"  # another operator or another weight format
    RETYPED = "retyped"  # same operator, other shape or dtype
    REWEIGHTED = "reweighted"  # same node, same type, other weight values


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """A node as it stood at one moment."""

    name: str
    op: str
    module: str = ""
    type: str = ""
    inputs: tuple[str, ...] = ()
    format: str = ""  # weight format spec; empty when the node holds no weight
    parameters: int = 0
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Change:
    """One edit. `before` is None for an added node, `after` for a removed one."""

    pass_spec: str
    action: Action
    why: str
    before: NodeRecord | None = None
    after: NodeRecord | None = None
    facts: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"action": self.action.value, "facts": dict(self.facts)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Change:
        """Inverse of `to_dict`."""
        records = {k: NodeRecord(**(data[k] | {"inputs": tuple(data[k]["inputs"])})) if data[k] else None for k in ("before", "after")}
        return Change(pass_spec=data["pass_spec"], action=Action(data["action"]), why=data["why"], facts=data["facts"], **records)


@dataclass
class Journal:
    """Edits in the order they were made."""

    changes: list[Change] = field(default_factory=list)

    def add(self, change: Change) -> None:
        """Append one edit."""
        self.changes.append(change)

    def copy(self) -> Journal:
        """An independent copy."""
        return Journal(list(self.changes))
