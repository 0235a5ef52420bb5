"""Entropic allocation: how much every layer loses, less where it changes its stream more.

Source: MoDeGPT (arXiv 2408.09632), section 3.4: the removed shares phi maximise `sum_l s_l (1 - phi_l) + e sum_l H(phi_l)` under a fixed mean, s being the
block influence of ShortGPT (arXiv 2403.03853). The solution is a softmax of -s / e; shares above a cap are cut there and the rest shared out again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.errors import PassError


def entropic(influence: Tensor, average: float, temperature: float = 0.15, cap: float = 0.8) -> Tensor:
    """Removed shares `[L] float64` of mean `average`, none above `cap`, from block influences `[L]`."""
    if average > cap:
        raise PassError(
            f"entropic allocation: a mean share of {average:.3f} cannot be removed if no layer may lose more than cap={cap}; raise cap or the ratio"
        )
    weights = torch.softmax(-influence.double() / temperature, 0)
    shares, full = torch.zeros_like(weights), torch.zeros(len(weights), dtype=torch.bool)
    for _ in range(len(weights)):
        room = average * len(weights) - cap * int(full.sum())
        shares = torch.where(full, cap, room * weights / weights[~full].sum().clamp_min(1e-300))
        over = shares > cap
        if not bool((over & ~full).any()):
            break
        full |= over
    return shares.clamp_max(cap)
