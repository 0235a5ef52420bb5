"""Exactly `keep` of every `group` consecutive columns: nearly as free as unstructured sparsity, and as many values in every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from ..spec import option
from .sparse import Sparse, largest_of_groups


@dataclass(frozen=True, kw_only=True)
class Balanced(Sparse):
    """`keep` of every `group` columns are present (some may be 0); a short last group keeps min(keep, its width)."""

    keep: int = option(16, ge=1)
    group: int = option(32, ge=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep >= self.group:
            raise FormatError(f"balanced: keep={self.keep} of group={self.group}: expected fewer than all; use the inner format {self.values} alone")

    def kept_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """As many in every row."""
        return (rows, columns // self.group * self.keep + min(self.keep, columns % self.group))

    def pack_presence(self, present: Tensor) -> dict[str, Tensor]:
        """Eight columns a byte; every group must have its number."""
        if not torch.equal(present, largest_of_groups(present.float(), self.keep, self.group)):
            raise FormatError(f"{self.to_spec()}: the mask {list(present.shape)} has groups that do not keep exactly {self.keep} of {self.group}")
        return super().pack_presence(present)

    def choose(self, matrix: Tensor) -> Tensor:
        """The `keep` largest magnitudes of every group."""
        return largest_of_groups(matrix.abs(), self.keep, self.group)
