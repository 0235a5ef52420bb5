"""Axis rules: one short function per operator that unifies the axes of its arguments and gives those of its results.

A rule is registered for an operator name without its overload (`"aten.linear"`), takes the `Tracer` and the node, and returns a tuple of axes (a list of
such for several results). It may raise `MisalignedError`: the node is then treated as one without a rule, which pins all it touches. Adding an operator is one
function in one of these files.
"""

from __future__ import annotations

import operator

from torch import fx

from ..nodes import op_name
from . import contraction, convolution, factory, indexing, layout, normalization, pointwise, reduction  # noqa: F401  (they register their rules)
from .registry import RULES, Rule


def rule_for(node: fx.Node) -> Rule | None:
    """The rule for the node's operator, or None."""
    if node.target is operator.getitem:
        return RULES["getitem"]
    name = op_name(node)
    found = RULES.get(name) or RULES.get(".".join(name.split(".")[:2]))
    return found or (RULES["pointwise"] if pointwise.is_pointwise(node) else None)
