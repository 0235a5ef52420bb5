"""Deterministic printed form of a program: one line a node, weights inline, symbols renamed in order of appearance."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from .nodes import module_path, node_type, op_name
from .program import Program
from .sites import find_sites

_SYMBOL = re.compile(r"(?<![%@.\w])[su]\d+\b")  # not the name of a node or tensor


def program_text(program: Program) -> str:
    """The whole program as text; equal programs print equally, whatever symbols torch chose."""
    sites = {s.node: s for s in find_sites(program)}
    lines = [_line(node, sites.get(node)) for node in program.graph.nodes if node.op != "get_attr"]
    text = f"program {program.stage.value} {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"
    return _rename_symbols(text)


def _line(node: fx.Node, site: Any) -> str:
    left = f"%{node.name}"
    typed = node_type(node)
    arguments = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
    if node.op == "placeholder":
        return f"{left} : {typed or 'constant'} = input"
    if node.op == "output":
        return f"return {arguments}"
    note = [module_path(node)] if module_path(node) else []
    if site is not None:
        note.append(f"site {site.name}, {site.format.to_spec()}, {site.nbytes} bytes")
    return f"{left} : {typed or '?'} = {op_name(node)}({arguments})" + (f"  # {'; '.join(note)}" if note else "")


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}:{node_type(value)}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v)}" for k, v in value.items()) + "}"
    return f"'{value}'" if isinstance(value, str) else str(value)


def _rename_symbols(text: str) -> str:
    names: dict[str, str] = {}

    def renamed(line: str) -> str:
        code, mark, note = line.partition("  # ")
        return _SYMBOL.sub(lambda m: names.setdefault(m.group(), f"s{len(names)}"), code) + mark + note

    return "".join(map(renamed, text.splitlines(keepends=True)))
