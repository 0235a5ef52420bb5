"""Pytree structures as JSON, read without importing anything the file names.

`torch.utils._pytree.treespec_loads` imports modules for enums and for default factories of a `defaultdict`; both are refused here first.
"""

from __future__ import annotations

import json
from typing import Any

import torch.utils._pytree as pytree

from ..ir.errors import ArtifactError
from .json_values import DAMAGED


def spec_to_json(spec: pytree.TreeSpec, where: str) -> Any:
    """A pytree structure as JSON data; `ArtifactError` when one of its types is not registered under a serialized name."""
    try:
        data = json.loads(pytree.treespec_dumps(spec))
        _plain_tree(data[1], [], where)
        return data
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: the structure {spec} cannot be saved: {error}; use tuples, lists, dicts or registered pytree types") from error


def spec_from_json(data: Any, where: str, *, plain_if_unknown: bool = False) -> tuple[pytree.TreeSpec, tuple[str, ...]]:
    """Inverse of `spec_to_json`, and notes.

    A type this process has not registered is an `ArtifactError`; with `plain_if_unknown` it becomes a dict (when its context is a list of as many names)
    or a tuple of its children instead, and a note says so.
    """
    notes: list[str] = []
    try:
        protocol, root = data
        safe = _plain_tree(root, notes, where)
        if notes and not plain_if_unknown:
            raise ArtifactError(f"{where}: {notes[0].partition(',')[0]}; import the package that defines it before loading")
        return pytree.treespec_loads(json.dumps([protocol, safe])), tuple(notes)
    except (KeyError, TypeError, ValueError, AssertionError, NotImplementedError, AttributeError) as error:
        raise ArtifactError(f"{where}: malformed pytree structure: {type(error).__name__}: {error}; {DAMAGED}") from error


def _plain_tree(node: Any, notes: list[str], where: str) -> dict[str, Any]:
    """The tree with unregistered types replaced by plain containers; refuses contexts that would import something."""
    children = [_plain_tree(child, notes, where) for child in node["children_spec"]]
    kind, context = node["type"], node["context"]
    if kind is None:
        return {"type": None, "context": None, "children_spec": children}
    _refuse_imports(kind, context, where)
    if kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and kind != pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
        return {"type": kind, "context": context, "children_spec": children}
    keys = _keys(context, len(children))
    plain = "tuple" if keys is None else "dict"
    notes.append(f"the type {kind} is not registered in this process, so its values come back as a plain {plain}")
    return {"type": f"builtins.{plain}", "context": json.dumps(keys), "children_spec": children}


def _refuse_imports(kind: Any, context: Any, where: str) -> None:
    parsed = _parsed(context)
    if kind == "collections.defaultdict" or _holds_enum(parsed):
        raise ArtifactError(f"{where}: a {kind} whose structure names Python code ({str(parsed)[:80]}) is never loaded; use dicts with text keys")


def _parsed(context: Any) -> Any:
    try:
        return json.loads(context) if isinstance(context, str) else context
    except ValueError:
        return context


def _holds_enum(value: Any) -> bool:
    if isinstance(value, dict):
        return "__enum__" in value or any(map(_holds_enum, value.values()))
    return isinstance(value, list) and any(map(_holds_enum, value))


def _keys(context: Any, count: int) -> list[str] | None:
    names = _parsed(context)
    fits = isinstance(names, list) and len(names) == count and all(isinstance(n, str) for n in names)
    return names if fits else None
