"""Names and dynamic axes of the ONNX inputs and outputs, as the user knows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...ir.program import Program

if TYPE_CHECKING:
    import onnx_ir


def input_names(program: Program) -> list[tuple[int, str]]:
    """(leaf index, name) of every tensor input: the keyword it is passed by, else the placeholder's name; caches by their path (`past_key_values.0.key`)."""
    placeholders = [str(n.target) for n in program.graph.nodes if n.op == "placeholder"]
    keywords = program.inputs.keywords
    keys = {i: k for i, k in enumerate(keywords) if k is not None and keywords.count(k) == 1}
    for key in program.inputs.caches:
        paths = _paths(pytree.tree_structure(program.inputs.kwargs[key]))
        keys |= {i: ".".join((key, *path)) for i, path in zip((i for i, k in enumerate(keywords) if k == key), paths, strict=True)}
    leaves = program.inputs.leaves
    return [(i, keys.get(i, p)) for i, p in enumerate(placeholders) if isinstance(leaves[i], Tensor)]


def output_names(program: Program) -> list[tuple[int, str]]:
    """(leaf index, name) of every tensor output, named by its pytree keys: `logits`, `hidden_states_0`; `output` for a lone tensor."""
    leaves = next(n for n in program.graph.nodes if n.op == "output").args[0]
    spec = program.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    dot = "." if program.inputs.caches else "_"
    paths = [dot.join(p) or "output" for p in _paths(spec)] if spec is not None else ["output"]
    flat = list(leaves) if isinstance(leaves, (tuple, list)) else [leaves]
    taken = {name for _, name in input_names(program)}
    named = [(i, f"output_{p}" if p[0].isdigit() else p) for i, (leaf, p) in enumerate(zip(flat, paths, strict=True)) if isinstance(leaf, fx.Node)]
    return [(i, f"{name}_out" if name in taken else name) for i, name in named]


def _paths(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    """Path of every leaf, keys where the container has text keys, positions elsewhere."""
    if spec.is_leaf():
        yield ()
        return
    children = spec.children()
    keys = _keys(spec.context, len(children))
    for key, child in zip(keys, children, strict=True):
        for path in _paths(child):
            yield (key, *path)


def _keys(context: Any, count: int) -> list[str]:
    fields = getattr(context, "_fields", context)
    if isinstance(fields, (list, tuple)) and len(fields) == count and all(isinstance(k, str) for k in fields):
        return [re.sub(r"\W", "_", k) for k in fields]
    return [str(i) for i in range(count)]


def apply_signature(program: Program, model: onnx_ir.Model) -> None:
    """Give the graph's inputs and outputs their names and named dynamic axes; sizes of inner values are dropped."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    symbols: dict[str, str] = {}
    dynamic = program.inputs.dynamic
    taken = {n for _, n in input_names(program)} | {n for _, n in output_names(program)}
    _free_names(model, taken)
    for value, (leaf, name) in zip(inputs, input_names(program), strict=True):
        value.name = name
        for axis, known in (dynamic[leaf] if dynamic else {}).items():
            assert value.shape is not None
            symbols.setdefault(str(value.shape[axis]), known.name)
    for value, (_, name) in zip(outputs, output_names(program), strict=True):
        value.name = name
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None
    for value in (*inputs, *outputs):
        _rename_axes(value, symbols)


def _free_names(model: onnx_ir.Model, taken: set[str]) -> None:
    """Move inner values out of the way of the signature's names."""
    graph = model.graph
    for value in (*graph.initializers.values(), *(v for n in graph for v in n.outputs)):
        if value.name in taken:
            value.name = f"{value.name}.inner"


def _rename_axes(value: onnx_ir.Value, symbols: dict[str, str]) -> None:
    import onnx_ir as ir

    if value.shape is None:
        return
    renamed = [d if isinstance(d, int) else re.sub(r"\b[su]\d+\b", lambda m: symbols.get(m.group(), m.group()), str(d)) for d in value.shape]
    value.shape = ir.Shape(renamed)
