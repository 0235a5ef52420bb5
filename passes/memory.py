"""What a run remembers between planning a pass and carrying it out, so that costly analyses of the same weights are made once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

from torch import Tensor

from ..ir.program import Program
from ..ir.weights import named_tensors

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
