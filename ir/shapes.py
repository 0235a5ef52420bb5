"""Shapes and dtypes of every node, as fake values in `node.meta["val"]`: found again after a structural edit, or for a program read from files."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind

from .errors import EditError
from .nodes import get_tensor, op_name
from .program import Program

_TRANSPOSES = {torch.ops.aten.transpose.int, torch.ops.aten.permute.default}


def ensure_values(program: Program) -> None:
    """Compute the values when some operator has none."""
    if any(n.op in ("call_function", "placeholder") and "val" not in n.meta for n in program.graph.nodes):
        propagate(program)


def propagate(program: Program, changed: Collection[fx.Node] | None = None) -> None:
    """Recompute every node's fake value from the inputs on, dynamic axes staying symbolic; `EditError` names the node where shapes no longer fit.

    `changed`: the calls and reads that are no longer those their values were computed for. Then only these and what follows from them is computed again.
    """
    mode, inputs = _inputs(program)
    values: dict[fx.Node, Any] = {}
    moved: set[fx.Node] = set()
    waiting = iter(inputs)
    with mode, torch.no_grad(), enable_python_dispatcher():
        for node in program.graph.nodes:
            known = node.meta.get("val")
            if node.op == "placeholder":
                values[node] = next(waiting)
            elif node.op == "get_attr":
                values[node] = mode.from_tensor(get_tensor(program.graph_module, str(node.target)), static_shapes=True)
                moved.update([node] if changed is None or node in changed else [])
            elif node.op == "call_function":
                stands = changed is not None and node not in changed and moved.isdisjoint(node.all_input_nodes) and _lives_in(known, mode)
                values[node] = known if stands else _call(node, values)
                moved.update([] if stands or _types(values[node]) == _types(known) else [node])
            if node.op != "output":
                node.meta["val"] = values[node]


def _lives_in(value: Any, mode: FakeTensorMode) -> bool:
    """Whether a value is known, in this mode."""
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return bool(tensors) and all(isinstance(t, torch._subclasses.FakeTensor) and t.fake_mode is mode for t in tensors)


def _types(value: Any) -> list[Any]:
    """What operators can tell of a fake value."""
    return [(v.dtype, v.device, _sizes(v.shape), _sizes(v.stride())) if isinstance(v, Tensor) else _sizes([v]) for v in pytree.tree_leaves(value)]


def _sizes(sizes: Iterable[Any]) -> list[Any]:
    """Sizes that can be compared: asking symbolic ones whether they are equal would fix them."""
    return [s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes]


def place(program: Program, device: torch.device | str) -> None:
    """Move the values, not the tensors, to `device`; views that only held for the layouts of the old device are relaxed."""
    relax_views(program.graph)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch._subclasses.FakeTensor):
            with value.fake_mode:
                node.meta["val"] = value.to(device)
    if any("val" in n.meta for n in program.graph.nodes):
        propagate(program)


def relax_views(graph: fx.Graph) -> None:
    """Views of transposed tensors may hold for one layout only: attention kernels of unequal head sizes, and of other devices, have others."""
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.target is torch.ops.aten.view.default and isinstance(source, fx.Node) and source.target in _TRANSPOSES:
            node.target = torch.ops.aten.reshape.default


def fake_mode_of(node: fx.Node) -> FakeTensorMode:
    """The mode in which the node's fake value lives."""
    value = node.meta["val"]
    if not isinstance(value, torch._subclasses.FakeTensor):
        raise EditError(f"{node.name} has no fake value to propagate from")
    return value.fake_mode


def call_fake(node: fx.Node) -> Any:
    """The fake value of a new node from those of its inputs."""
    values = {n: n.meta["val"] for n in node.all_input_nodes if "val" in n.meta}
    mode = next(v.fake_mode for v in values.values() if isinstance(v, torch._subclasses.FakeTensor))
    for n in node.all_input_nodes:
        if n not in values:
            values[n] = mode.from_tensor(get_tensor(n.graph.owning_module, str(n.target)), static_shapes=True)  # type: ignore[arg-type]
    with mode, torch.no_grad(), enable_python_dispatcher():  # without it some operators fix symbolic sizes
        return _call(node, values)


def take_place(node: fx.Node, old: fx.Node) -> fx.Node:
    """Give a new node the metadata of `old`, whose part it plays, but for the value, which is its own, and the name of a site; returns it."""
    node.meta = {k: v for k, v in old.meta.items() if k not in ("val", "fxpress_site")}
    node.meta["val"] = call_fake(node)
    return node


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shapes = [list(v.shape) for v in args if isinstance(v, Tensor)]
        raise EditError(f"{op_name(node)} at {node.name} cannot take inputs of shapes {shapes}: {str(error).splitlines()[0]}") from error


def _inputs(program: Program) -> tuple[FakeTensorMode, list[Any]]:
    """The placeholders' fake values and their mode; from a fresh export when the program carries none."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    if any("val" not in n.meta for n in placeholders):
        exported = program.to_exported()
        names = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}  # constants too
        placeholders = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]
    values = [n.meta.get("val") for n in placeholders]
    mode = next((v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)
    return mode or FakeTensorMode(), values
