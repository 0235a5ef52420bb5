"""Structured optimal brain surgeon: which columns a layer can spare when the others make up for them as well as they can.

Source: Hassibi & Stork 1992 for single weights; Kurtic et al., "ZipLM", NeurIPS 2023 (arXiv 2302.04089), equations 3 and 4 for structures, whose greedy
elimination this follows. With `H = E[x x^T] + damp` and `H^-1` of the columns still there, removing the columns `S` of one index raises the output error by
`tr(W_S ([H^-1]_SS)^-1 W_S^T)`, and `H^-1` loses `S` by one block elimination.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibrate import Statistics

if TYPE_CHECKING:
    from .groups import Consumer, Group

STEPS = 48
DAMPING = 1e-2  # of the mean of H's diagonal


def obs_scores(consumer: Consumer, groups: Sequence[Group], statistics: Statistics, sensitivity: Tensor | None = None) -> dict[Group, Tensor]:
    """Per group `[size] f32`: what is lost with each index, in the greedy order (so later ones cost more).

    A share of the consumer's output energy; with the `sensitivity [N]` of its outputs an estimate of the rise of the loss.
    """
    assert statistics.gram is not None
    gram = statistics.gram.sum(0)
    weight = consumer.site.matrix().float()
    if sensitivity is not None:
        weight = weight * (sensitivity * statistics.tokens).sqrt().unsqueeze(1)
    energy = 1.0
    if sensitivity is None:
        energy = float((weight @ gram * weight).sum()) if consumer.site.groups == 1 else float(gram.trace())
    scored = {}
    for group in groups:
        if consumer.site.groups > 1:  # without make-up by others: the output energy of the index's own columns
            score = consumer.per_index(group.axis, weight.square().sum(0) * gram.diagonal())
        else:
            score = eliminate(weight, gram, consumer.columns(group.axis), group.size)
        scored[group] = score / max(energy, 1e-30)
    return {g: s.float() for g, s in scored.items()}


def damped(gram: Tensor, share: float = DAMPING) -> Tensor:
    """`H` with a share of its mean diagonal added."""
    return gram + torch.eye(len(gram), dtype=gram.dtype) * max(float(gram.diagonal().mean()) * share, 1e-12)


def eliminate(weight: Tensor, gram: Tensor, owner: Tensor, size: int, damping: float = DAMPING) -> Tensor:
    """Greedy elimination; `owner [K]` gives each column's index, or -1. Returns the error rise at each index's turn, `[size]`, never falling.

    At most `STEPS` rounds are made, so indices of one round do not see each other go.
    """
    columns = torch.stack([(owner == j).nonzero().flatten() for j in range(size)])  # [size, m]
    weight, inverse = weight.clone(), torch.linalg.inv(damped(gram, damping))
    alive, score, highest = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=weight.dtype), 0.0
    for start in range(0, size, step := max(1, size // STEPS)):
        rises = torch.where(alive, _rises(weight, inverse, columns, alive), torch.inf)
        going = rises.argsort(stable=True)[: min(step, size - start)]
        score[going] = rises[going].clamp_min(highest)
        highest = float(score[going].max())
        alive[going] = False
        if start + step < size:
            _remove(weight, inverse, columns[going].flatten())
    return score


def _rises(weight: Tensor, inverse: Tensor, columns: Tensor, alive: Tensor) -> Tensor:
    """`tr(W_S ([H^-1]_SS)^-1 W_S^T)` for every index still there, 0 for the others."""
    if columns.shape[1] == 1:
        own = columns[:, 0]
        return weight[:, own].square().sum(0) / inverse[own, own].clamp_min(1e-300)
    blocks = torch.stack([inverse[c][:, c] for c in columns])
    parts = torch.stack([weight[:, c] for c in columns])
    out = torch.zeros(len(columns), dtype=weight.dtype)
    solved = torch.linalg.solve(blocks[alive], parts[alive].transpose(1, 2))
    out[alive] = (parts[alive].transpose(1, 2) * solved).sum((1, 2))
    return out


def _remove(weight: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Move the columns' share to the others, then take them out of both; in place."""
    block = inverse[gone][:, gone]
    share = torch.linalg.solve(block, inverse[gone])  # [m, K]
    weight -= weight[:, gone] @ share
    inverse -= inverse[:, gone] @ share
    weight[:, gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0
