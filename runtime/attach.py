"""Put a compressed program's weights back into the user's own model, so that its other methods (Hugging Face `generate`) run on them."""

from __future__ import annotations

import copy
from collections import defaultdict

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ir.errors import LowerError
from ..ir.program import Program
from ..ir.weights import named_tensors, set_tensor
from .attach_plan import plan_attach
from .compressed_modules import compressed_copy, write_sizes
from .graph_match import WAY_OUT, match_graphs


def attach(model: nn.Module, original: Program, program: Program, keep_decoded: bool = False) -> nn.Module:
    """A copy of `model`, in evaluation mode, that computes what `program` computes.

    The copy has modules of its own, and shares memory with `model` for every tensor that did not change; its parameters take no gradients. Compressed sites
    become `compressed_modules`, sites with new dense values get them under all tied names, folded batch norms become `nn.Identity`. `model` is not touched.

    Args:
        model: the module that `original` was captured from, with the same weights.
        original: the program as captured.
        program: what the passes made of it.
        keep_decoded: decode every weight once and leave the model's own classes in place: faster, and as large in memory as the dense model.

    Raises:
        LowerError: names a site or operator that the model's modules cannot express, such as a factorized linear.
    """
    match = match_graphs(original, program)
    plan = plan_attach(model, original, program, match, keep_decoded=keep_decoded)
    result = _structural_copy(model)
    for (owner, leaf), tensor in plan.dense.items():
        _set_dense(result, owner, leaf, tensor)
    replaced: dict[int, nn.Module] = {}
    for (owner, leaf), held in plan.compressed.items():
        module = result.get_submodule(owner)
        if id(module) in replaced:
            raise LowerError(f"attach: site {held.site}: {owner} holds two compressed weights; {WAY_OUT}")
        replaced[id(module)] = compressed_copy(module, leaf, held.site, held.bias, transposed=held.transposed)
    for path in match.folded:
        replaced[id(_batch_norm(result, path))] = nn.Identity()
    return _swap(result, replaced).eval()


def _structural_copy(model: nn.Module) -> nn.Module:
    """A deep copy with fresh parameters and buffers over the same memory."""
    memo: dict[int, object] = {}
    for tensor in {id(t): t for _, t in named_tensors(model)}.values():
        shared = tensor.detach()
        memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise LowerError(f"attach: {type(model).__name__} cannot be copied: {error}; {WAY_OUT}") from error


def _set_dense(result: nn.Module, owner: str, leaf: str, tensor: Tensor) -> None:
    module = result.get_submodule(owner)
    if leaf not in module._parameters and leaf not in module._buffers:
        raise LowerError(f"attach: {owner} ({type(module).__name__}) has no {leaf} to hold a new value; {WAY_OUT}")
    set_tensor(module, leaf, tensor, parameter=leaf in module._parameters)
    if leaf == "weight" and isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
        write_sizes(module, tuple(tensor.shape))


def _batch_norm(result: nn.Module, path: str) -> nn.Module:
    try:
        module = result.get_submodule(path)
    except AttributeError:
        module = result
    if not isinstance(module, _BatchNorm):
        raise LowerError(f"attach: the batch norm folded in {path or 'the model itself'} is no BatchNorm module that could be left out; {WAY_OUT}")
    return module


def _swap(result: nn.Module, replaced: dict[int, nn.Module]) -> nn.Module:
    """Put the new modules in, under every name of the old ones."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in result.modules():
        for name, child in module._modules.items():
            if id(child) in replaced:
                places[id(child)].append((module, name))
    for key, found in places.items():
        for module, name in found:
            module._modules[name] = replaced[key]
    return replaced.get(id(result), result)
