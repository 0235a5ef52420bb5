"""What a run remembers between planning a pass and carrying it out, and after a kill, so that costly analyses of the same weights are made once."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..ir.program import Program
from ..ir.weights import named_tensors

if TYPE_CHECKING:
    from .context import Context

T = TypeVar("T")


class Memory:
    """Values by key, each valid for the very tensors it was made from (programs share tensors and never write into them)."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[dict[str, Tensor], Any]] = {}

    def recall(self, key: Hashable, program: Program) -> Any:
        """The value kept under `key` for a program that holds the same tensors, or None."""
        tensors, value = self._kept.get(key, ({}, None))
        now = dict(named_tensors(program.graph_module))
        return value if tensors.keys() == now.keys() and all(now[n] is t for n, t in tensors.items()) else None

    def keep(self, key: Hashable, program: Program, value: T) -> T:
        """Keep `value` under `key` for the program's present tensors."""
        self._kept[key] = (dict(named_tensors(program.graph_module)), value)
        return value


Tensors = dict[str, Tensor]


def release() -> None:
    """Give freed memory back to the system. glibc keeps it below whatever small tensor was made last: over 16 windows SmolLM2's weights once more."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def remembered(ctx: Context, what: str, names: Iterable[str], program: Program, compute: Callable[[], Tensors]) -> Tensors:
    """`compute()`, one tensor a name, made once a run for these weights, and once over all runs that share a checkpoint folder."""
    from .checkpoint import fingerprint

    key = f"{what}-{hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:12]}"
    known: Tensors | None = ctx.memory.recall(key, program)
    if known is not None:
        return known
    if ctx.checkpoint is None:
        return ctx.memory.keep(key, program, compute())
    name = f"{key}-{fingerprint(program, [key], (), ctx.seed)[:16]}"
    found = ctx.checkpoint.read(name)
    if found is None:
        found = {}, compute()
        ctx.checkpoint.write(name, found[1], found[0])
    else:
        ctx.checkpoint.reused += 1
    return ctx.memory.keep(key, program, found[1])
