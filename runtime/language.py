"""Language-model quality: perplexity, distance between two models' predictions, greedy continuation.

All functions take a `Logits` callable, token ids `[B, S] int64` to logits `[B, S, V]` float of any width; `logits_of` makes one. Sums run in float64 over
slices of a million logits, so that no second copy of `[B, S, V]` is ever held.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..ir.errors import CalibrationError
from ..ir.program import Program
from .measurement import Measurement

Logits = Callable[[Tensor], Tensor]
CHUNK = 1 << 20  # logits held in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Perplexity(Measurement):
    """`exp(nll)`; `nll` is the mean negative log-likelihood in nats over `tokens` predicted tokens."""

    perplexity: float
    nll: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class LogitComparison(Measurement):
    """Mean KL(reference || candidate) in nats, and the fraction of positions with the same most likely token, over `tokens` positions."""

    kl: float
    top1_agreement: float
    tokens: int


def logits_of(model: Program | nn.Module | Callable[..., Any]) -> Logits:
    """`input_ids -> logits` of a program, a module or any function of token ids.

    `attention_mask` is filled with ones, `token_type_ids` with zeros, `position_ids` with 0, 1, ...; `use_cache` is False; a program's other constants are as
    captured. Of the output, the tensor itself, its `logits`, or the first tensor is taken. Raises `CalibrationError` for inputs that cannot be filled so, and
    for ids of another shape than a program was captured for.
    """
    if isinstance(model, Program):
        return lambda ids: _logits(_run_program(model, ids))
    return lambda ids: _logits(_run_module(model, ids))


def perplexity(model: Logits, windows: Tensor, *, batch: int = 1) -> Perplexity:
    """Next-token perplexity over `windows: [count, length] int64`; every token but a window's first is predicted, no special token is added."""
    total, tokens = 0.0, 0
    for ids in _batches(windows, batch):
        for logits, targets in _rows(_checked(model, ids), ids):
            total += float(F.cross_entropy(logits[: len(targets)].double(), targets, reduction="sum"))
            tokens += len(targets)
    nll = total / tokens
    return Perplexity(perplexity=math.exp(nll) if nll < 700 else math.inf if nll == nll else math.nan, nll=nll, tokens=tokens)


def compare_logits(reference: Logits, candidate: Logits, windows: Tensor, *, batch: int = 1) -> LogitComparison:
    """Compare the predictions of two models at every position of `windows: [count, length] int64`."""
    divergence, agreed, tokens = 0.0, 0, 0
    for ids in _batches(windows, batch):
        for (a, _), (b, _) in zip(_rows(_checked(reference, ids), ids), _rows(_checked(candidate, ids), ids), strict=True):
            p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
            divergence += float((p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0).sum())
            agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
            tokens += len(a)
    return LogitComparison(kl=divergence / tokens, top1_agreement=agreed / tokens, tokens=tokens)


def greedy_sample(model: Logits, ids: Tensor, new_tokens: int) -> Tensor:
    """`ids: [B, S] int64` continued by `new_tokens` most likely tokens, `[B, S + new_tokens]`; the whole text is run for each token, without a cache."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, _checked(model, ids)[:, -1].argmax(-1, keepdim=True).to(ids)], dim=1)
    return ids


def _batches(windows: Tensor, batch: int) -> Iterator[Tensor]:
    if windows.dim() != 2 or windows.is_floating_point() or windows.shape[0] < 1 or windows.shape[1] < 2 or batch < 1:
        got = f"{windows.dtype} {list(windows.shape)}, batch {batch}"
        raise CalibrationError(f"windows: expected token ids [count >= 1, length >= 2] and batch >= 1, got {got}; see fxpress.runtime.zoo.token_windows")
    yield from windows.split(batch)


def _rows(logits: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices `[T, V]` of each text's logits with the tokens that follow; the last slice of a text has one token less."""
    step = max(1, CHUNK // logits.shape[-1])
    for text, tokens in zip(logits, ids.to(logits.device), strict=True):
        for start in range(0, len(tokens), step):
            yield text[start : start + step], tokens[start + 1 : start + 1 + step]


def _checked(model: Logits, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CalibrationError(f"logits: expected [{ids.shape[0]}, {ids.shape[1]}, V] for ids {list(ids.shape)}, got {got}; wrap the model in logits_of")
    return logits


def _run_program(program: Program, ids: Tensor) -> Any:
    if program.inputs.caches:
        given = {k: v for k, v in program.inputs.kwargs.items() if k not in program.inputs.caches}
        return program.run(**{k: ids if k == "input_ids" else _fill(k, ids, v) for k, v in given.items()})
    names = [str(n.target) for n in program.graph.nodes if n.op == "placeholder"]
    leaves = program.inputs.leaves
    tensors = [n for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)]
    main = "input_ids" if "input_ids" in tensors else tensors[0]
    filled = [ids if n == main else _fill(n, ids, leaf) if isinstance(leaf, Tensor) else leaf for n, leaf in zip(names, leaves, strict=True)]
    if (reason := program.inputs.why_mismatch(filled)) is not None:
        raise CalibrationError(f"logits_of: the program does not take ids {list(ids.shape)}: {reason}")
    args, kwargs = pytree.tree_unflatten(program.inputs.placed(filled), pytree.tree_structure((program.inputs.args, program.inputs.kwargs)))
    return program.run(*args, **kwargs)


def _fill(name: str, ids: Tensor, example: Tensor) -> Tensor:
    if name == "attention_mask" and example.dim() == 2:
        return torch.ones_like(ids, dtype=example.dtype)
    if name == "token_type_ids":
        return torch.zeros_like(ids, dtype=example.dtype)
    if name == "position_ids":
        return torch.arange(ids.shape[1], device=ids.device, dtype=example.dtype).expand_as(ids)
    raise CalibrationError(f"logits_of: cannot make the input {name} {list(example.shape)} from token ids; pass a function of input_ids instead of the program")


def _run_module(model: nn.Module | Callable[..., Any], ids: Tensor) -> Any:
    known = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        ids = ids.to(next((p.device for p in model.parameters()), ids.device))
    extra = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        return model(ids, **{k: v for k, v in extra.items() if k in known})


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = next((t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)), None) if found is None else found
    if not isinstance(found, Tensor):
        raise CalibrationError(f"logits_of: the model returned {type(output).__name__} without a tensor in it; pass a function that returns logits")
    return found
