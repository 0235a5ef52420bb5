"""What a compressed program changed, as changes of weights in the modules it was captured from, or the reason why it cannot be said so."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import fx

from ..ir.errors import LowerError
from ..ir.nodes import argument, module_path, op_name
from ..ir.program import Program
from ..ir.sites import SiteKind, WeightSite

WAY_OUT = "use result.module() instead"


@dataclass(frozen=True)
class GraphMatch:
    """Counterparts in two programs of one structure.

    `sites`: each weight site before and after. `reads`: names of the tensors that other nodes read, before and after. `folded`: module paths of the batch
    norms that are gone.
    """

    sites: tuple[tuple[WeightSite, WeightSite], ...]
    reads: tuple[tuple[str, str], ...]
    folded: tuple[str, ...]


def match_graphs(original: Program, program: Program) -> GraphMatch:
    """Match node by node, by name. `LowerError` when the programs differ in more than weights, weight formats, biases and folded batch norms."""
    return _Matcher(original, program).match()


class _Matcher:
    def __init__(self, original: Program, program: Program) -> None:
        self.program = program
        self.before, self.after = _nodes(original), _nodes(program)
        self.sites_before = {s.node: s for s in original.sites()}
        self.sites_after = {s.node: s for s in program.sites()}
        self.live = _live(original)
        self.reads: dict[tuple[str, str], None] = {}
        self.folded: dict[str, fx.Node] = {}

    def match(self) -> GraphMatch:
        for name, node in self.before.items():
            if name not in self.after:
                self._gone(node)
        sites = []
        for name, new in self.after.items():
            old = self.before.get(name)
            if old is None:
                self._refuse(new, "was added")
            pair = self.sites_before.get(old), self.sites_after.get(new)
            if pair[0] is not None and pair[1] is not None:
                self._check_site(pair[0], pair[1])
                sites.append((pair[0], pair[1]))
            elif old.target != new.target or not self._same(old.args, new.args) or not self._same(old.kwargs, new.kwargs):
                self._refuse(new, "was changed")
        return GraphMatch(tuple(sites), tuple(self.reads), self._folded_paths())

    def _gone(self, node: fx.Node) -> None:
        if "batch_norm" in op_name(node):
            self.folded[node.name] = node
        elif node in self.live and self._result_of_folded(node) is None:
            self._refuse(node, "was removed")

    def _folded_paths(self) -> tuple[str, ...]:
        paths = {module_path(n): n for n in self.folded.values()}
        for node in self.after.values():
            if "batch_norm" in op_name(node) and module_path(node) in paths:
                self._refuse(paths[module_path(node)], "was folded at one of its two uses")
        return tuple(paths)

    def _check_site(self, old: WeightSite, new: WeightSite) -> None:
        if old.node.target == new.node.target:
            same = self._same(_arguments(old.node), _arguments(new.node), weights=True)
        else:
            same = self._same(old.data, new.data) and self._same(_bias(old), _bias(new), weights=True)
        if not same:
            self._refuse(new.node, "takes other inputs than before")

    def _stands_for(self, node: fx.Node) -> str:
        """Name of the node that gives this value after batch norms are folded."""
        norm = self._result_of_folded(node)
        return node.name if norm is None else self._stands_for(norm.args[0])  # type: ignore[arg-type]

    def _result_of_folded(self, node: fx.Node) -> fx.Node | None:
        """The folded batch norm that `node` is, or is a result of."""
        source = node.args[0] if node.target is operator.getitem else node
        return self.folded.get(source.name) if isinstance(source, fx.Node) else None

    def _same(self, old: Any, new: Any, *, weights: bool = False) -> bool:
        """Whether two arguments are the same; pairs of weight reads are noted. `weights`: those of a site, which may differ and are seen to elsewhere."""
        if weights and _is_weight(old) and _is_weight(new):
            return True
        if isinstance(old, fx.Node) and isinstance(new, fx.Node):
            if old.op == "get_attr" and new.op == "get_attr":
                self.reads[str(old.target), str(new.target)] = None
                return True
            return "get_attr" not in (old.op, new.op) and self._stands_for(old) == new.name
        if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
            return len(old) == len(new) and all(self._same(a, b, weights=weights) for a, b in zip(old, new, strict=True))
        if isinstance(old, dict) and isinstance(new, dict):
            return list(old) == list(new) and all(self._same(old[k], new[k], weights=weights) for k in old)
        return type(old) is type(new) and bool(old == new)

    def _refuse(self, node: fx.Node, what: str) -> NoReturn:
        why = next((c for c in reversed(self.program.journal.changes) if node.name in (getattr(c.before, "name", ""), getattr(c.after, "name", ""))), None)
        by = f" by {why.pass_spec} ({why.why})" if why else ""
        where = module_path(node) or node.name
        raise LowerError(f"attach: {op_name(node)} in {where} (node {node.name}) {what}{by}, which the model's own modules cannot express; {WAY_OUT}")


def _nodes(program: Program) -> dict[str, fx.Node]:
    return {n.name: n for n in program.graph.nodes if n.op != "get_attr"}


def _live(program: Program) -> set[fx.Node]:
    """Nodes the outputs depend on: editing drops the others."""
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op in ("output", "placeholder") or any(user in live for user in node.users):
            live.add(node)
    return live


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments in schema order, defaults filled in."""
    return [argument(node, a.name) for a in node.target._schema.arguments]  # type: ignore[union-attr]


def _bias(site: WeightSite) -> Any:
    return argument(site.node, "self" if site.kind is SiteKind.ADDMM else "bias")


def _is_weight(value: Any) -> bool:
    return value is None or (isinstance(value, fx.Node) and value.op == "get_attr")
