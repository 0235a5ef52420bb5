"""A program as an `ExportedProgram` without tracing it again: its graph is one already, with tensors to lift and values to carry over.

Tracing costs minutes on deep models with symbolic sizes; this costs a walk over the nodes. What tracing would do besides, checking shapes under the dynamic
axes anew, `Program.to_exported` does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ConstantArgument, ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, SymIntArgument, TensorArgument

from .nodes import get_tensor
from .program import Program
from .shapes import ensure_values, fake_mode_of
from .weights import storage_key


def lifted(program: Program) -> ExportedProgram:
    """The exported program; its tensors are the program's own."""
    ensure_values(program)
    graph, old_graph = fx.Graph(), program.graph
    placeholders = [n for n in old_graph.nodes if n.op == "placeholder"]
    reads = _first_names(program, [str(n.target) for n in old_graph.nodes if n.op == "get_attr"])
    mode = fake_mode_of(next(n for n in placeholders if isinstance(n.meta["val"], torch._subclasses.FakeTensor)))
    taken = {n.name for n in old_graph.nodes if n.op != "get_attr"}
    state: dict[str, Tensor] = {}
    specs: list[InputSpec] = []
    made: dict[str, fx.Node] = {}
    for target in dict.fromkeys(reads.values()):
        tensor = get_tensor(program.graph_module, target)
        node = graph.placeholder(_free("p_" + target.replace(".", "_"), taken))
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        kind = InputKind.PARAMETER if isinstance(tensor, torch.nn.Parameter) else InputKind.BUFFER
        specs.append(InputSpec(kind, TensorArgument(node.name), target, None if kind is InputKind.PARAMETER else True))
        state[target], made[target] = tensor, node
    copied: dict[fx.Node, fx.Node] = {}
    for old in old_graph.nodes:
        if old.op == "get_attr":
            copied[old] = made[reads[str(old.target)]]
            continue
        copied[old] = graph.node_copy(old, copied.__getitem__)
        copied[old].meta = dict(old.meta)
        if old.op == "placeholder":
            copied[old].name = old.name
            specs.append(InputSpec(InputKind.USER_INPUT, _argument(old), None))
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    (output,) = graph.find_nodes(op="output")
    leaves = list(output.args[0]) if isinstance(output.args[0], (list, tuple)) else [output.args[0]]
    output.args = (tuple(leaves),)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(leaf), None) for leaf in leaves]
    info = old_graph._codegen.pytree_info  # type: ignore[attr-defined]
    call = ModuleCallSignature(inputs=[], outputs=[], in_spec=info.in_spec, out_spec=info.out_spec or pytree.tree_structure(0))
    return ExportedProgram(
        root=torch.nn.Module(), graph=graph, graph_signature=ExportGraphSignature(specs, outputs), state_dict=state,
        range_constraints=_ranges(mode), module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=(program.inputs.args, program.inputs.kwargs),
    )  # fmt: skip


def _first_names(program: Program, names: list[str]) -> dict[str, str]:
    """For every name that is read the first one of the same tensor: tied weights are lifted once."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name in names:
        tensor = get_tensor(program.graph_module, name)
        same = (*storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        found[name] = first.setdefault(same, name)
    return found


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _argument(node: Any) -> Any:
    """How a signature names an input or output."""
    if not isinstance(node, fx.Node):
        return ConstantArgument(name="", value=node)
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return TensorArgument(node.name)
    return SymIntArgument(node.name) if isinstance(value, torch.SymInt) else ConstantArgument(name=node.name, value=value)


def _ranges(mode: torch._subclasses.FakeTensorMode) -> dict[Any, Any]:
    known = mode.shape_env
    return {} if known is None else dict(known.var_to_range)
