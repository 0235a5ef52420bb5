"""Really remove indices of axis classes: weights, statistics, buffers and the shape constants of the graph, then check every shape against the plan.

Editing weights alone can be silently wrong: a head removed from an OPT layer under an unchanged `view(.., heads, dim)` moves data into the sequence axis.
Here every constant that follows a class is rewritten, shapes are propagated anew, and each node's shape must be the one the axes predict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .atoms import Axis, leaves, size_of
from .axes import AxisAnalysis, AxisClass, Choice, Constant, hint, kept_positions, kept_size
from .errors import EditError, FormatError
from .formats.base import is_prefix
from .nodes import argument, get_tensor, op_name
from .shapes import propagate, relax_views

if TYPE_CHECKING:
    from .edit import Editor
    from .program import Program
    from .sites import WeightSite


def checked_choice(analysis: AxisAnalysis, kept: Mapping[AxisClass, Tensor]) -> dict[Any, Tensor]:
    """The choice by atom; `EditError` for pinned classes, classes of another analysis, and indices that are missing, repeated or out of range."""
    known = {c.atom for c in analysis.classes}
    for one, indices in kept.items():
        if one.atom not in known:
            raise EditError(f"resize {one.name}: the class belongs to another analysis; analyze the program as it stands now")
        if one.pinned:
            raise EditError(f"resize {one.name}: it is pinned ({one.pinned[0]}), nothing can be removed from it")
        values = indices.tolist() if indices.dim() == 1 and indices.dtype in (torch.int64, torch.int32) else []
        if not values or len(set(values)) != len(values) or min(values) < 0 or max(values) >= one.size:
            raise EditError(f"resize {one.name}: expected at least one of its {one.size} indices, each once, got {values[:8]}")
    return {one.atom: indices.to(torch.get_default_device(), torch.int64) for one, indices in kept.items()}


def resize(editor: Editor, analysis: AxisAnalysis, choice: Choice, *, views: bool = False) -> None:
    """Carry out a checked choice on the editor's program, which is the one `analysis` was made of; when that fails the program is as before.

    With `views` the smaller tensors share memory with the old ones; `EditError` where what stays is no prefix.
    """
    _check_same(editor, analysis)
    restore = _saved(editor.program)
    try:
        _carry_out(editor, analysis, choice, views)
    except BaseException:
        restore()
        raise


def _saved(program: Program) -> Callable[[], None]:
    """What puts the program's tensors and nodes back as they are now."""
    nodes = [(n, n.target, n.args, n.kwargs, dict(n.meta)) for n in program.graph.nodes]
    tensors = [(m, dict(m._parameters), dict(m._buffers)) for m in program.graph_module.modules()]

    inputs = program.inputs

    def restore() -> None:
        program.inputs = inputs
        for node, target, args, kwargs, meta in nodes:
            node.target, node.args, node.kwargs, node.meta = target, args, kwargs, meta
        for module, parameters, buffers in tensors:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)

    return restore


def _carry_out(editor: Editor, analysis: AxisAnalysis, choice: Choice, views: bool) -> None:
    before = _calls(editor.program)
    for name in changed_tensors(analysis, choice):
        tensor = get_tensor(editor.program.graph_module, name).detach()
        for dim, axis in enumerate(analysis.tensors[name]):
            if any(leaf in choice for leaf in leaves(axis)):
                tensor = _kept(tensor, dim, kept_positions(axis, choice).to(tensor.device), f"resize {name}" if views else "")
        editor.set_tensor(name, tensor if views else tensor.contiguous())
    packed = set(changed_nodes(analysis, choice))
    for site in [s for s in editor.program.sites() if s.node in packed]:
        _cut_packed(editor, site, analysis.packed[site.node], choice, views)
    _resize_caches(editor.program, analysis, choice)
    _rewrite_splits(analysis, choice)
    for constant in analysis.constants:
        _rewrite(constant, choice)
    for node, axis in analysis.scales:
        if kept_size(axis, choice) != size_of(axis) and argument(node, "scale") is None:
            node.kwargs = {**node.kwargs, "scale": size_of(axis) ** -0.5}
    if any(_head_size_changes(analysis, node, choice) for node, _ in analysis.scales):
        relax_views(editor.program.graph)
    propagate(editor.program, {node for node, call in _calls(editor.program).items() if call != before[node]})
    _check_shapes(analysis, choice)


def _resize_caches(program: Program, analysis: AxisAnalysis, choice: Choice) -> None:
    """The examples of the caches get the sizes that the model gives them from now on."""
    leaves, spec = pytree.tree_flatten((program.inputs.args, program.inputs.kwargs))
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    for i in program.inputs.cache_leaves:
        for dim, axis in enumerate(analysis.axes[places[i]]):
            leaves[i] = leaves[i].index_select(dim, kept_positions(axis, choice).to(leaves[i].device))
        value = places[i].meta["val"]
        with value.fake_mode:
            places[i].meta["val"] = value.new_empty(
                [old if isinstance(old, torch.SymInt) else new for old, new in zip(value.shape, leaves[i].shape, strict=True)]
            )
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    program.inputs = replace(program.inputs, args=args, kwargs=kwargs)


def _calls(program: Program) -> dict[fx.Node, tuple[Any, ...]]:
    """What every node calls or reads."""
    module = program.graph_module
    return {n: (n.target, n.args, n.kwargs, id(get_tensor(module, str(n.target))) if n.op == "get_attr" else 0) for n in program.graph.nodes}


def _kept(tensor: Tensor, dim: int, positions: Tensor, view: str) -> Tensor:
    """The positions of one dimension; a view where one was asked for (by what an error begins with)."""
    if not view:
        return tensor.index_select(dim, positions)
    if not is_prefix(positions):
        raise EditError(f"{view}: what stays in dimension {dim} is no prefix, so it would have to be copied; use the pass slice")
    return tensor.narrow(dim, 0, len(positions))


def _cut_packed(editor: Editor, site: WeightSite, axes: tuple[Axis, Axis], choice: Choice, views: bool) -> None:
    """The stored tensors of a compressed linear, as its format takes the rows and the first columns that stay."""
    rows, columns = (kept_positions(axis, choice) for axis in axes)
    if site.tied:
        raise EditError(f"resize {site}: {', '.join(site.tied)} reads the same {site.format.to_spec()}; untie it before quantizing")
    if not is_prefix(columns):
        raise EditError(f"resize {site}: of packed inputs only the first ones can be kept; cut before quantizing")
    old = site.payload()
    try:
        new = site.format.take(old, site.rows, site.columns, rows, len(columns))
    except FormatError as error:
        raise EditError(f"resize {site}: {error}") from error
    copied = next((n for n, t in new.items() if t.untyped_storage().data_ptr() != old[n].untyped_storage().data_ptr()), None)
    if views and copied is not None:
        raise EditError(f"resize {site}: what stays of its {copied} is no prefix, so it would have to be copied; use the pass slice")
    for name, tensor in zip(site.tensors, new.values(), strict=True):
        editor.set_tensor(name, tensor if views else tensor.contiguous())


def changed_tensors(analysis: AxisAnalysis, choice: Choice) -> list[str]:
    """Names of the tensors that hold a chosen class, in the order of the analysis."""
    held = {o.tensor for c in analysis.classes if c.atom in choice for o in c.occurrences}
    return [name for name in analysis.tensors if name in held]


def changed_nodes(analysis: AxisAnalysis, choice: Choice) -> list[fx.Node]:
    """Compressed linears that hold a chosen class."""
    return [node for node, axes in analysis.packed.items() if any(leaf in choice for axis in axes for leaf in leaves(axis))]


def _check_same(editor: Editor, analysis: AxisAnalysis) -> None:
    if analysis.program is not editor.program:
        raise EditError("resize: the analysis was made of another program; analyze the one being edited")
    for name, axes in analysis.tensors.items():
        shape = list(get_tensor(editor.program.graph_module, name).shape)
        if shape != [size_of(a) for a in axes]:
            raise EditError(f"resize: {name} has become {shape} since the analysis; analyze the program as it stands now")


def _rewrite(constant: Constant, choice: Choice) -> None:
    """Set the int to the new size when it changed."""
    old, new = sum(map(size_of, constant.axes)), sum(kept_size(a, choice) for a in constant.axes)
    if old == new:
        return
    where, *inside = constant.path
    if isinstance(where, str):
        constant.node.kwargs = {**constant.node.kwargs, where: _replaced(constant.node.kwargs[where], inside, constant.sign * new)}
    else:
        args = list(constant.node.args)
        args[where] = _replaced(args[where], inside, constant.sign * new)
        constant.node.args = tuple(args)


def _replaced(value: Any, path: list[int | str], new: int) -> Any:
    if not path:
        return new
    items = list(value)
    items[path[0]] = new  # type: ignore[index]
    return items


def _rewrite_splits(analysis: AxisAnalysis, choice: Choice) -> None:
    """Cuts whose parts changed name every part's size from now on."""
    for node, parts in analysis.splits:
        sizes = [kept_size(p, choice) for p in parts]
        if sizes != [size_of(p) for p in parts]:
            dim = int(argument(node, "dim"))
            node.target, node.args, node.kwargs = torch.ops.aten.split_with_sizes.default, (node.args[0], sizes, dim), {}


def _head_size_changes(analysis: AxisAnalysis, attention: fx.Node, choice: Choice) -> bool:
    """Whether queries or values of the attention get narrower."""
    ends = [analysis.axes[n][-1] for n in attention.args[:3]]  # type: ignore[index]
    return any(kept_size(axis, choice) != size_of(axis) for axis in ends)


def _check_shapes(analysis: AxisAnalysis, choice: Choice) -> None:
    by_format = {stored for node in analysis.packed for stored in node.args[1]}  # type: ignore[union-attr]
    for node, axes in analysis.axes.items():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(axes, tuple) and node not in by_format:
            expected, got = [kept_size(a, choice) for a in axes], [hint(s) for s in value.shape]
            if expected != got:
                raise EditError(f"resize: {op_name(node)} at {node.name} has shape {got}, the axes say {expected}; this is a fault of its axis rule")


def readers(program_graph: fx.Graph, names: set[str]) -> list[fx.Node]:
    """Nodes that read one of the tensors, in graph order."""
    return [n for n in program_graph.nodes if any(i.op == "get_attr" and i.target in names for i in n.all_input_nodes)]
