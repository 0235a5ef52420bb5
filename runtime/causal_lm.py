"""Causal language models with their cache of keys and values: one program for the prompt and for every token after it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim

from ..ir.capture import capture
from ..ir.edit import Editor
from ..ir.errors import CaptureError, LowerError, MissingExtraError
from ..ir.inputs import DynamicAxis
from ..ir.program import Program
from ..ir.shapes import call_fake, propagate

CACHE = "past_key_values"
MOST_ROWS = 1024  # of a batch


def capture_causal_lm(model: nn.Module, *, longest: int | None = None) -> Program:
    """Capture a Hugging Face causal language model with its cache.

    The program takes `input_ids: [B, S] int64` (new tokens), `attention_mask: [B, P + S] int64` (1 for tokens, 0 for padding on the left) and
    `past_key_values`, for every layer `{"key": [B, G, P, D], "value": [B, G, P, D]}` of earlier calls; a call that leaves it out starts a text (P = 0).
    It returns `logits: [B, S, V]` and `present`, the caches of P + S tokens, to be given back with the next tokens. Batch, S and P vary freely. Positions
    are counted from the mask. All passes work on it; calibration batches need no cache. Weights have the names they have in `model`.

    Args:
        model: any decoder of transformers with a plain growing cache in every layer.
        longest: most tokens of a text; what the model's config says if left out.

    Raises:
        CaptureError: for models without such a cache (encoder-decoders, sliding windows, recurrent states), and what torch.export refuses.
    """
    shapes = _cache_shapes(model)
    limit = longest or getattr(model.config, "max_position_embeddings", None) or 4096
    past = [{name: torch.zeros(2, heads, 3, width) for name, (heads, width) in layer.items()} for layer in shapes]
    example = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": torch.ones(2, 7, dtype=torch.int64), CACHE: _cast(past, model)}
    batch, new, held = Dim("batch", max=MOST_ROWS), Dim("new", max=limit), Dim("past", min=0, max=limit)
    caches = [{name: {0: batch, 2: held} for name in layer} for layer in shapes]
    program = capture(_with_cache(model), example, dynamic_shapes={"input_ids": {0: batch, 1: new}, "attention_mask": {0: batch, 1: Dim.AUTO}, CACHE: caches})
    axes = tuple({i: _from_nothing(axis) for i, axis in per_leaf.items()} for per_leaf in program.inputs.dynamic)
    program.inputs = replace(program.inputs, dynamic=axes, caches=(CACHE,))
    return program


def last_logits(program: Program) -> Program:
    """A clone that returns `logits: [B, 1, V]` of the last new token alone: what writing a text needs, without the head's work for the rest of a prompt.

    Raises `LowerError` where the logits come from anything but a weight and operators that keep its axes.
    """
    clone = program.clone()
    sites = {s.node: s for s in clone.sites()}
    node = pytree.arg_tree_leaves(clone.graph.output_node().args[0])[0]
    while node not in sites and node.op == "call_function" and node.all_input_nodes and node.meta["val"].dim() == 3:
        node = node.all_input_nodes[0]
    if node not in sites or sites[node].data.meta["val"].dim() != 3:
        raise LowerError(f"last_logits: the logits come from {node.name}, expected a weight that is multiplied by [B, S, D]; serve with all_logits=True")
    with Editor(clone, "last_logits"):
        data = sites[node].data
        with clone.graph.inserting_before(node):
            last = clone.graph.call_function(torch.ops.aten.slice.Tensor, (data, 1, -1, 2**63 - 1))
        last.meta["val"] = call_fake(last)
        node.replace_input_with(data, last)
    propagate(clone, {node})
    return clone


def _from_nothing(axis: DynamicAxis) -> DynamicAxis:
    """Texts start with an empty cache."""
    return replace(axis, low=axis.low - 1) if "past" in axis.parts else axis


def _cast(past: list[dict[str, Tensor]], model: nn.Module) -> list[dict[str, Tensor]]:
    kind = next(model.parameters())
    return [{name: t.to(device=kind.device, dtype=kind.dtype) for name, t in layer.items()} for layer in past]


def _cache_shapes(model: nn.Module) -> list[dict[str, tuple[int, int]]]:
    """Heads and widths of every layer's keys and values, from a run over two tokens."""
    cache = _empty_cache(model)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    training = model.training
    try:
        with torch.no_grad():
            found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, return_dict=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(f"{type(model).__name__} does not run with a cache: {type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    layers = found.past_key_values.layers
    if any(not layer.is_initialized for layer in layers):
        raise CaptureError(f"{type(model).__name__}: some of its {len(layers)} layers keep no keys and values of their own; only plain caches are supported")
    return [{"key": _heads(layer.keys), "value": _heads(layer.values)} for layer in layers]


def _heads(held: Tensor) -> tuple[int, int]:
    return held.shape[1], held.shape[3]


def _empty_cache(model: nn.Module) -> Any:
    """The growing cache of transformers, all layers plain."""
    try:
        from transformers import DynamicCache, PreTrainedModel
        from transformers.cache_utils import DynamicLayer
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "capturing a language model with its cache") from error
    what = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise CaptureError(f"expected a causal language model of transformers, got {what}; fxpress.capture takes any module, without a cache")
    cache = DynamicCache(config=model.config)
    odd = next((f"layer {i} has a {type(layer).__name__}" for i, layer in enumerate(cache.layers) if type(layer) is not DynamicLayer), None)
    if odd is not None or not cache.layers:
        raise CaptureError(f"{what}: {odd or 'its config names no layers'}; only plain growing caches of keys and values are supported")
    return cache


def _with_cache(model: nn.Module) -> nn.Module:
    """The same modules under the same names, with a `forward` of tensors."""
    kind = type(model)
    takes_positions = "position_ids" in inspect.signature(kind.forward).parameters

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[dict[str, Tensor]]) -> dict[str, Any]:
        torch._check(attention_mask.shape[1] == input_ids.shape[1] + past_key_values[0]["key"].shape[2])
        cache = _empty_cache(model)
        for layer, held in zip(cache.layers, past_key_values, strict=True):
            layer.keys, layer.values, layer.is_initialized = held["key"], held["value"], True
            layer.dtype, layer.device = held["key"].dtype, held["key"].device
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        options = {"position_ids": positions} if takes_positions else {}
        found = kind.forward(self, input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, return_dict=True, **options)
        return {"logits": found.logits, "present": [{"key": layer.keys, "value": layer.values} for layer in found.past_key_values.layers]}

    cached = copy.copy(model)
    cached.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return cached
