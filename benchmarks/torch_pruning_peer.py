"""Torch-Pruning (DepGraph, Fang et al. 2023) as the peer of `benchmarks/structured_cnn.py`: prune a net to a given number of multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Batch = tuple[Tensor, Tensor]


def macs(model: Callable[[Tensor], Any], x: Tensor) -> int:
    """Multiply-adds of convolutions and matrix products for one image of `x`, as PyTorch counts them when the model runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    return counter.get_total_flops() // 2


def torch_pruning() -> Any:
    """The package, or what to install."""
    try:
        import torch_pruning  # type: ignore[import-untyped]
    except ImportError as error:
        raise SystemExit("this benchmark compares with Torch-Pruning: pip install --no-deps torch-pruning==1.6.1") from error
    return torch_pruning


def prune_to(model: nn.Module, x: Tensor, goal: int, batches: Sequence[Batch], *, importance: str, global_ranking: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned copy of `model` whose multiply-adds come within 1 % of `goal` (else closest to it), and the settings that led there.

    The pruning ratio is bisected, with channels rounded to multiples of 8; of 4, 2, 1 where such steps are too coarse. The output layer keeps its rows.
    `importance`: `taylor` (first order, from the gradients of the cross-entropy over `batches`) or `magnitude` (p=2).
    """
    gradients = _gradients(model, batches) if importance == "taylor" else {}
    found: list[tuple[float, nn.Module, dict[str, Any]]] = []
    for multiple in (8, 4, 2, 1):
        low, high = 0.0, 0.95
        for _ in range(14):
            ratio = (low + high) / 2
            options = {"pruning_ratio": ratio, "global_pruning": global_ranking, "round_to": multiple if multiple > 1 else None}
            pruned = _prune(model, x, gradients, options)
            count = macs(pruned, x)
            found.append((abs(count / goal - 1), pruned, {"importance": importance, **options}))
            low, high = (ratio, high) if count > goal else (low, ratio)
        if min(off for off, *_ in found) < 0.01:
            break
    _, best, settings = min(found, key=lambda one: one[0])
    return best, settings


def _prune(model: nn.Module, x: Tensor, gradients: dict[str, Tensor], options: dict[str, Any]) -> nn.Module:
    tp = torch_pruning()
    pruned = copy.deepcopy(model).eval()
    for name, parameter in pruned.named_parameters():
        parameter.grad = gradients[name].clone() if gradients else None
    scores = tp.importance.GroupTaylorImportance() if gradients else tp.importance.GroupMagnitudeImportance(p=2)
    output = [m for m in pruned.modules() if isinstance(m, nn.Linear)][-1]
    tp.pruner.BasePruner(pruned, x[:1], importance=scores, ignored_layers=[output], **options).step()
    pruned.zero_grad(set_to_none=True)
    return pruned


def _gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Gradients of the cross-entropy, summed over the batches, at the trained weights (batch norm in evaluation mode)."""
    probe = copy.deepcopy(model).eval()
    for x, y in batches:
        F.cross_entropy(probe(x), y).backward()
    return {name: p.grad for name, p in probe.named_parameters() if p.grad is not None}
