"""What earlier passes changed or created, read off the journal."""

from __future__ import annotations

from ..ir.journal import Change
from ..ir.program import Program
from .trainable import Part


class Changed:
    """The nodes that the journal of `program` names, and the sites that became factors.

    A site counts when it was given other values, another shape or another operator, or when it is a factor `<site>.<link>` of a site that was replaced; a
    norm counts when its node is named.
    """

    def __init__(self, program: Program) -> None:
        changes = program.journal.changes
        self.nodes = {record.name for c in changes for record in (c.before, c.after) if record is not None}
        self._present = {c.after.name for c in changes if c.after is not None}
        self._replaced = {f"{c.before.module}." for c in changes if c.before is not None and _was_factorized(c)}

    def __bool__(self) -> bool:
        return bool(self.nodes)

    def holds(self, part: Part) -> bool:
        """Whether earlier passes changed or created this part."""
        return part.node.name in self._present or (part.site is not None and any(part.name.startswith(site) for site in self._replaced))


def _was_factorized(change: Change) -> bool:
    """Whether a weight went into operators of its own: the node that took its place holds no weight format."""
    return change.before is not None and change.before.parameters > 0 and change.after is not None and not change.after.format
