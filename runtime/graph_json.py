"""An FX graph as JSON, in a schema of our own, and back. Equal graphs give equal JSON.

`{"schema": 1, "name", "nodes": [{"op", "name", "target", "args", "kwargs", "type", "stack", "notes"}], "stacks", "signature"}`: `type` is the shape
(ints, or text for symbols) and dtype of the value, `stack` an index into the module stacks, `notes` the `fxpress_*` metadata, `signature` the pytrees of
the call. Reading runs no code from the file: FX writes Python source from names, so every name that reaches that source must be an identifier, or
free of quotes (weight names); functions are looked up, never imported; arguments are plain values. Calling the program runs the operators it names.
"""

from __future__ import annotations

import json
import keyword
import re
from typing import Any

from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo

from ..ir.errors import ArtifactError
from ..ir.nodes import TensorType, node_type
from ..ir.weights import named_tensors
from .json_values import DAMAGED, decode, encode
from .op_targets import resolve_target, target_name
from .tree_specs import spec_from_json, spec_to_json

SCHEMA = 1
_WEIGHT_NAME = re.compile(r"[^\"'\\.]+(\.[^\"'\\.]+)*")
Stack = tuple[tuple[str, str, str], ...]


def graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
    """JSON data of the module's graph; its tensors are not in it. `ArtifactError` for anything that `graph_from_json` could not read."""
    stacks: dict[Stack, int] = {}
    nodes = [_node_to_json(node, stacks) for node in module.graph.nodes]
    listed = [[list(entry) for entry in stack] for stack in stacks]
    return {"schema": SCHEMA, "name": type(module).__name__, "nodes": nodes, "stacks": listed, "signature": _signature_to_json(module.graph)}


def graph_from_json(data: Any, tensors: nn.Module) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph module over the weights bound in `tensors`, and notes about output types this process does not know.

    Each node gets `loaded_type`, `nn_module_stack` and its `fxpress_*` metadata; there are no fake values in `meta["val"]`.
    """
    try:
        if data["schema"] != SCHEMA:
            raise ArtifactError(f"graph: schema {data['schema']}, this fxpress reads schema {SCHEMA}; upgrade fxpress")
        graph = _graph(data)
        _check_weights(graph, tensors)
        codegen, notes = _signature_from_json(data["signature"])
        graph.set_codegen(codegen)
        module = fx.GraphModule(tensors, graph, _identifier(data["name"], "graph"))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError, RuntimeError, SyntaxError) as error:
        raise ArtifactError(f"graph: malformed: {type(error).__name__}: {str(error)[:200]}; {DAMAGED}") from error
    module.train(False)
    return module, notes


def _graph(data: Any) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        _add_node(graph, item, nodes, data["stacks"])
    return graph


def _check_weights(graph: fx.Graph, tensors: nn.Module) -> None:
    bound = {name for name, _ in named_tensors(tensors)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in bound:
            raise ArtifactError(f"node {node.name}: the weight {node.target} is not stored; {DAMAGED}")


def _node_to_json(node: fx.Node, stacks: dict[Stack, int]) -> dict[str, Any]:
    where = f"node {node.name}"
    _refuse_default(node.op, [*node.args, *node.kwargs], where)
    item: dict[str, Any] = {"op": node.op, "name": _identifier(node.name, where), "target": _target_to_json(node, where)}
    item |= {"args": [encode(a, where) for a in node.args], "kwargs": {_identifier(k, where): encode(v, where) for k, v in node.kwargs.items()}}
    if (typed := node_type(node)) is not None and node.op != "get_attr":
        item["type"] = [list(typed.shape), encode(typed.dtype, where)]
    if stack := _stack(node):
        item["stack"] = stacks.setdefault(stack, len(stacks))
    if notes := {k: encode(v, where) for k, v in node.meta.items() if k.startswith("fxpress_")}:
        item["notes"] = notes
    return item


def _target_to_json(node: fx.Node, where: str) -> str:
    if node.op == "call_function":
        return target_name(node.target, where)
    return _text_target(node.op, node.target, where)


def _stack(node: fx.Node) -> Stack:
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((str(key), str(path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}") for key, (path, kind) in stack.items())


def _add_node(graph: fx.Graph, item: dict[str, Any], nodes: dict[str, fx.Node], stacks: Any) -> None:
    name = _identifier(item["name"], "graph")
    where = f"node {name}"
    _refuse_default(item["op"], [*item["args"], *item["kwargs"]], where)
    args = tuple(decode(a, nodes, where) for a in item["args"])
    kwargs = {_identifier(k, where): decode(v, nodes, where) for k, v in item["kwargs"].items()}
    target = resolve_target(item["target"], where) if item["op"] == "call_function" else _text_target(item["op"], item["target"], where)
    node = graph.create_node(item["op"], target, args, kwargs, name)
    if node.name != name:
        raise ArtifactError(f"{where}: the name is taken or reserved; {DAMAGED}")
    nodes[name] = node
    node.meta = _meta(item, stacks, where)


def _meta(item: dict[str, Any], stacks: Any, where: str) -> dict[str, Any]:
    meta = {k: decode(v, {}, where) for k, v in item.get("notes", {}).items() if k.startswith("fxpress_")}
    if "type" in item:
        shape, dtype = item["type"]
        meta["loaded_type"] = TensorType(tuple(s if isinstance(s, int) else str(s) for s in shape), decode(dtype, {}, where))
    if "stack" in item:
        meta["nn_module_stack"] = {str(key): (str(path), str(kind)) for key, path, kind in stacks[item["stack"]]}
    return meta


def _text_target(op: str, target: Any, where: str) -> str:
    """Target of a node that calls nothing: an input's name, a weight's dotted name, or `output`."""
    if op == "placeholder":
        return _identifier(target, where)
    if op == "get_attr" and isinstance(target, str) and _WEIGHT_NAME.fullmatch(target) and target.isprintable():
        return target
    if op == "output" and target == "output":
        return "output"
    raise ArtifactError(f"{where}: expected an input, a weight name without quotes, an operator call or the output, got {op} {str(target)[:80]!r}")


def _refuse_default(op: str, arguments: list[Any], where: str) -> None:
    """FX splits the source of an input's default value at colons: never let one through."""
    if op == "placeholder" and arguments:
        raise ArtifactError(f"{where}: an input with a default value ({str(arguments[0])[:80]}) cannot be saved; pass the value as an example input")


def _identifier(name: Any, where: str) -> str:
    if isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
        return name
    raise ArtifactError(f"{where}: expected a Python identifier, got {str(name)[:80]!r}; rename the input or node")


def _signature_to_json(graph: fx.Graph) -> dict[str, Any] | None:
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None:
        return None
    inputs = spec_to_json(info.in_spec, "inputs")
    _check_keywords(inputs)
    outputs = None if info.out_spec is None else spec_to_json(info.out_spec, "outputs")
    return {"arguments": [_identifier(n, "signature") for n in info.orig_args], "inputs": inputs, "outputs": outputs}


def _signature_from_json(data: Any) -> tuple[CodeGen, tuple[str, ...]]:
    if data is None:
        return CodeGen(), ()
    names = [_identifier(n, "signature") for n in data["arguments"]]
    _check_keywords(data["inputs"])
    inputs, _ = spec_from_json(data["inputs"], "inputs")
    outputs, notes = (None, ()) if data["outputs"] is None else spec_from_json(data["outputs"], "outputs", plain_if_unknown=True)
    return _PyTreeCodeGen(_PyTreeInfo(names, inputs, outputs)), notes


def _check_keywords(spec: Any) -> None:
    """FX writes the keywords of `(args, kwargs)` into source between quotes, so they must be identifiers."""
    for child in spec[1]["children_spec"]:
        for key in json.loads(child["context"]) if child["type"] == "builtins.dict" else ():
            _identifier(key, "signature")
