"""Model to `Program`: `torch.export` (non-strict) -> functional graph (`functional`, or decomposition with an empty table) -> unlifted graph.

The empty decomposition table keeps `aten.linear`, `scaled_dot_product_attention`, `conv2d` and `layer_norm` whole and the result bit-equal;
torch's default table breaks GPT-2 and dissolves linears, so it is never used.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .errors import CaptureError
from .functional import functional
from .inputs import Inputs, as_inputs, dynamic_axes
from .nodes import op_name
from .program import Program, Stage
from .sites import name_sites
from .weights import named_tensors, set_tensor, shallow_tree


def capture(model: nn.Module | torch.export.ExportedProgram, example_inputs: Any = None, *, dynamic_shapes: Any = None) -> Program:
    """Capture `model` as a `Program`.

    `example_inputs`: a tuple of positional inputs, a dict of keyword inputs, or one tensor; pytrees are fine. Not needed for an
    ExportedProgram (which may hold compressed sites). `dynamic_shapes`: as in `torch.export.export`. The model is captured in
    evaluation mode and left as it was. Raises `CaptureError` with what to do when torch.export refuses the model or a weight is NaN or infinite.
    """
    if isinstance(model, torch.export.ExportedProgram):
        exported, given = model, None
    else:
        exported, given = _export(model, example_inputs, dynamic_shapes), dynamic_shapes
    if exported.example_inputs is None:
        raise CaptureError("the ExportedProgram has no example inputs; export it again with torch.export.export(module, args, kwargs)")
    args, kwargs = exported.example_inputs
    return _program(exported, tuple(args), dict(kwargs or {}), given)


def _export(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model: expected an nn.Module or ExportedProgram, got {type(model).__name__}")
    if example_inputs is None:
        raise CaptureError("example_inputs is missing; pass a tuple of positional inputs or a dict of keyword inputs")
    check_finite(model)
    args, kwargs = _where_weights_lie(model, *as_inputs(example_inputs))
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise CaptureError(_advice(type(model).__name__, error)) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _where_weights_lie(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs on the device of the model; one that is spread over several is refused."""
    found = {tensor.device: name for name, tensor in named_tensors(model) if tensor.dim()}
    if len(found) > 1:
        listed = ", ".join(f"{name} on {device}" for device, name in found.items())
        raise CaptureError(f"the weights lie on {len(found)} devices ({listed}); move the model to one of them")
    placed = Inputs(args, kwargs).to(next(iter(found))) if found else Inputs(args, kwargs)
    return placed.args, placed.kwargs


def _advice(what: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:3]) or type(error).__name__
    return (
        f"torch.export cannot capture {what}: {type(error).__name__}: {first[:400].rstrip('.')}. "
        "Usual ways out: wrap the model so that forward() takes and returns tensors only; replace Python branches on tensor values by torch.where "
        "or torch.cond; for Hugging Face models pass attention_mask and use_cache=False; declare varying sizes in dynamic_shapes, "
        "with example sizes of 2 or more on those axes. The full message is attached as the cause."
    )


def _program(exported: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> Program:
    ranges = dict(exported.range_constraints)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unlifted = functional(exported) or exported.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise CaptureError(_advice("the exported graph", error)) from error
    if not isinstance(unlifted, fx.GraphModule):
        raise CaptureError(f"unlifting gave a {type(unlifted).__name__}, expected a GraphModule; report this with your torch version")
    graph = unlifted.graph
    _drop_metadata_asserts(graph)
    _refuse_writes(graph)
    graph.eliminate_dead_code()  # reads of tied names and counters that nothing uses
    dynamic = dynamic_axes(graph, args, kwargs, given, ranges)
    module = fx.GraphModule(_tensor_tree(unlifted, graph), graph, "Program")
    module.train(False)
    compressed = any(op_name(n).startswith("fxpress.") for n in graph.nodes)
    program = Program(module, Inputs(args, kwargs, dynamic), Stage.COMPRESSED if compressed else Stage.CAPTURED)
    name_sites(program)
    check_finite(module)
    program.verify()
    return program


def _tensor_tree(unlifted: fx.GraphModule, graph: fx.Graph) -> nn.Module:
    """All tensors of the unlifted module under their names, constants bound as buffers too."""
    tree = shallow_tree(unlifted)
    bound = {name for name, _ in named_tensors(tree)}
    for node in graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and str(node.target) not in bound):
            value = _attribute(unlifted, str(node.target))
            if not isinstance(value, Tensor):
                raise CaptureError(
                    f"graph node {node.name} uses the submodule {node.target}: control flow and other higher-order operators are not supported; "
                    "capture the model with the branch fixed, or wrap the part without it"
                )
            set_tensor(tree, str(node.target), value.detach(), parameter=False)
            bound.add(str(node.target))
    return tree


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _drop_metadata_asserts(graph: fx.Graph) -> None:
    """Remove nodes that only pin a dtype or device; they would refuse any later change of type."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _refuse_writes(graph: fx.Graph) -> None:
    """Passes share tensors and reorder nothing; a forward() with side effects would change the user's model."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            written = node.args[0].target if node.args and isinstance(node.args[0], fx.Node) else "a tensor"
            raise CaptureError(f"forward() writes to {written} in place ({op_name(node)}); return the new value instead, or run the model without that state")


def check_finite(module: nn.Module) -> None:
    """Refuse NaN and infinite weights by name (buffers may hold infinities: attention masks do)."""
    for name, tensor in named_tensors(module):
        if is_lazy(tensor) or tensor.is_meta:
            raise CaptureError(f"weight {name} has no values yet (lazy or on the meta device); load the checkpoint before compressing it")
        broken = torch.isnan(tensor) if not isinstance(tensor, nn.Parameter) else ~torch.isfinite(tensor)
        if tensor.is_floating_point() and bool(broken.any()):
            raise CaptureError(
                f"weight {name} {list(tensor.shape)} holds {int(broken.sum())} NaN or infinite values; repair the checkpoint before compressing it"
            )
