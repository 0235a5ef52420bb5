"""What a running pass may use: calibration data, seed, progress, checkpoint. Nothing is global."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .memory import Memory

if TYPE_CHECKING:
    from ..ir.program import Program
    from .checkpoint import Checkpoint
    from .examples import Example
    from .losses import Loss

T = TypeVar("T")
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Context:
    """Shared by all passes of one run.

    `training` and `loss(outputs, target)` are for passes that train. The pipeline sets `original`, the program as it entered, `stage`, the
    number of the running stage, and `remarks` and `history`, where a running pass leaves sentences and the course of its training for its report.
    """

    calibration: Sequence[Call] = ()
    training: Sequence[Example] = ()
    loss: Loss | None = None
    original: Program | None = None
    stage: int = 0
    remarks: list[str] = field(default_factory=list)
    history: list[tuple[int, float]] = field(default_factory=list)
    seed: int = 0
    progress: bool = False
    checkpoint: Checkpoint | None = None
    memory: Memory = field(default_factory=Memory)
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("fxpress"))

    def generator(self) -> torch.Generator:
        """A fresh generator at the run's seed."""
        return torch.Generator().manual_seed(self.seed)

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Gradients on, and torch's own random numbers drawn at the run's seed; both as they were afterwards."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            yield

    def track(self, items: Sequence[T] | Iterable[T], label: str, total: int | None = None, status: Callable[[], str] | None = None) -> Iterator[T]:
        """Iterate with a progress bar when the run shows progress and stands at a terminal; `status` says something beside it after every item."""
        from .progress import track

        return track(items, label, total=total, enabled=self.progress, status=status)
