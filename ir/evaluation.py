"""Values of nodes by running no more of the graph than they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from .nodes import get_tensor
from .program import Program

MOST_NODES = 500  # a value that needs more is not worth it


def value_of(program: Program, wanted: fx.Node, given: Callable[[fx.Node], Any]) -> Any:
    """The value of `wanted` from parameters, buffers and what `given` says of nodes (None: not known).

    Raises:
        LookupError: it needs an input that `given` does not know, or more than `MOST_NODES` nodes.
    """
    known, waiting = dict[fx.Node, Any](), [wanted]
    needed = set(waiting)
    while waiting:
        node = waiting.pop()
        if (value := given(node)) is not None:
            known[node] = value
            continue
        if node.op not in ("call_function", "get_attr") or len(needed) > MOST_NODES:
            raise LookupError(node.name)
        fresh = [n for n in node.all_input_nodes if n not in needed]
        needed.update(fresh)
        waiting += fresh
    for node in (n for n in program.graph.nodes if n in needed and n not in known):
        if node.op == "get_attr":
            known[node] = get_tensor(program.graph_module, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known[wanted]
