"""The options of every training run, shared by the passes that train."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import cos, pi

import torch

from ..ir.spec import Options, option
from .losses import Objective, Outputs


class Precision(Enum):
    """Type of the forward and backward pass; weights and optimizer state are float32 either way."""

    FP32 = "fp32"  # as the program computes
    BF16 = "bf16"  # autocast

    @property
    def autocast(self) -> torch.dtype | None:
        """Type to cast to, or None."""
        return torch.bfloat16 if self is Precision.BF16 else None


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How to train: AdamW with linear warmup and a cosine schedule; see docs/passes/recover.md."""

    steps: int = option(200, ge=1)
    lr: float = option(1e-4, gt=0)
    warmup: float = option(0.05, ge=0, lt=1)  # fraction of the steps
    weight_decay: float = option(0.0, ge=0)
    accumulate: int = option(1, ge=1)  # batches a step
    clip: float = option(1.0, gt=0)  # largest gradient norm
    objective: Objective = Objective.AUTO
    outputs: Outputs = Outputs.AUTO
    temperature: float = option(1.0, gt=0)
    hidden: float = option(0.0, ge=0)  # weight of the hidden-state error
    cache: int = option(512, ge=0)  # MiB of the original's outputs that are kept for batches seen again
    dtype: Precision = Precision.FP32
    held_out: float = option(0.1, gt=0, lt=1)  # fraction of the batches
    evaluate_every: int = option(25, ge=1)
    patience: int = option(5, ge=1)  # evaluations without a better one
    trainable: tuple[str, ...] = ()
    keep_zeros: bool = True
    checkpoint_every: int = option(50, ge=1)

    def rate(self, step: int) -> float:
        """Learning rate of a step, the first being 0: up over the warmup, then down along a cosine towards 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        return self.lr * 0.5 * (1 + cos(pi * (step - rising) / max(1, self.steps - rising)))
