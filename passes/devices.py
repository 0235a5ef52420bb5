"""Where passes work: on the device that holds the program's weights. Random draws are made on the CPU, so that a seed means the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..ir.program import Program


def working_on(program: Program) -> AbstractContextManager[Any]:
    """Tensors made inside without a device lie with the program's weights (on the CPU they do anyway, at no cost)."""
    return nullcontext() if program.device.type == "cpu" else program.device


def waiting_for(program: Program) -> Callable[[], Any] | None:
    """What to call before a clock is read: a GPU runs on while Python goes ahead."""
    return torch.cuda.synchronize if program.device.type == "cuda" else None
