"""Where a training run stands, and its checkpoint: one safetensors file, so that a resumed run goes on exactly as the killed one would have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from .context import Context


@dataclass
class Standing:
    """Steps done, the held-out losses so far, and why the run stopped (empty while it runs)."""

    step: int = 0
    start: float = inf
    best: float = inf
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    stopped: str = ""
    setbacks: int = 0  # times the run went back because it stood above its start
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def slowed(self) -> float:
        """What is left of the learning rate: a quarter after each setback."""
        return float(0.25**self.setbacks)

    def take(self, loss: float) -> bool:
        """Note a held-out loss; whether it is the best so far."""
        self.history.append((self.step, loss))
        if not loss < self.best:
            self.stale += 1
            return False
        self.best, self.best_step, self.stale = loss, self.step, 0
        return True


def save_state(
    ctx: Context, label: str, standing: Standing, weights: Mapping[str, Tensor], best: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write everything the run needs to go on; nothing without a checkpoint folder."""
    if ctx.checkpoint is None:
        return
    tensors = {"rng": torch.get_rng_state()}
    for index, (name, weight) in enumerate(weights.items()):
        tensors[f"weight.{index}"] = weight.detach()
        tensors |= {f"adam.{index}.{key}": value for key, value in optimizer.state.get(weight, {}).items()}
        if name in best:
            tensors[f"best.{index}"] = best[name]
    ctx.checkpoint.write(_name(ctx, label), {k: t.contiguous() for k, t in tensors.items()}, {"names": list(weights), "standing": asdict(standing)})


def load_state(ctx: Context, label: str, weights: Mapping[str, Tensor], best: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Standing | None:
    """Bring weights, best weights, optimizer and random state back to where the checkpoint stands; None when there is none."""
    found = ctx.checkpoint.read(_name(ctx, label)) if ctx.checkpoint is not None else None
    if found is None or found[0]["names"] != list(weights):
        return None
    header, tensors = found
    with torch.no_grad():
        for index, (name, weight) in enumerate(weights.items()):
            weight.copy_(tensors[f"weight.{index}"])
            adam = {k.removeprefix(f"adam.{index}."): t for k, t in tensors.items() if k.startswith(f"adam.{index}.")}
            if adam:
                optimizer.state[weight] = {k: t.cpu() if k == "step" else t.to(weight.device) for k, t in adam.items()}
            if f"best.{index}" in tensors:
                best[name] = tensors[f"best.{index}"].to(weight.device)
    torch.set_rng_state(tensors["rng"].cpu())
    return _standing(header["standing"])


def _standing(data: Mapping[str, Any]) -> Standing:
    return Standing(**dict(data) | {"history": [(int(step), float(loss)) for step, loss in data["history"]]})


def _name(ctx: Context, label: str) -> str:
    return f"stage-{ctx.stage:02d}-{label}"
