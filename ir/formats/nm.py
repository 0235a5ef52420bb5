"""N:M sparsity: `keep` of every `group` columns, with their places as small numbers, as sparse tensor cores take them (2:4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FormatError
from ..spec import option
from .base import Payload, TensorSpec
from .bitpack import pack, packed_width, unpack
from .sparse import Sparse, largest_of_groups


@dataclass(frozen=True, kw_only=True)
class Nm(Sparse):
    """`keep` of every `group` columns are present (some may be 0); K must be a multiple of `group`."""

    keep: int = option(2, ge=1)
    group: int = option(4, ge=2, le=16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep >= self.group:
            raise FormatError(f"nm: keep={self.keep} of group={self.group}: expected fewer than all; use the inner format {self.values} alone")

    @property
    def place_bits(self) -> int:
        """Bits of a place in a group."""
        return (self.group - 1).bit_length()

    def kept_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """As many in every row."""
        return (rows, columns // self.group * self.keep)

    def presence_spec(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """`positions: [N, ceil(K / group * keep * place bits / 8)] uint8`, ascending in every group."""
        return {"positions": TensorSpec((rows, packed_width(columns // self.group * self.keep, self.place_bits)), torch.uint8)}

    def pack_presence(self, present: Tensor) -> dict[str, Tensor]:
        """Places of the present columns; every group must have its number."""
        groups = present.unflatten(1, (-1, self.group))
        if not bool((groups.sum(-1) == self.keep).all()):
            raise FormatError(f"{self.to_spec()}: the mask {list(present.shape)} has groups that do not keep exactly {self.keep} of {self.group}")
        places = groups.nonzero()[:, 2].reshape(present.shape[0], -1)
        return {"positions": pack(places.to(torch.uint8), self.place_bits)}

    def unpack_presence(self, payload: Payload, rows: int, columns: int) -> Tensor:
        """`[N, K] bool`."""
        places = unpack(payload["positions"], self.place_bits, columns // self.group * self.keep).unflatten(1, (-1, self.keep))
        empty = torch.zeros((rows, columns // self.group, self.group), dtype=torch.bool, device=places.device)
        return empty.scatter(-1, places.to(torch.int64), True).flatten(1)

    def choose(self, matrix: Tensor) -> Tensor:
        """The `keep` largest magnitudes of every group."""
        return largest_of_groups(matrix.abs(), self.keep, self.group)

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """Groups must be whole."""
        if columns % self.group:
            return f"groups of {self.group} do not divide its {columns} columns; use balanced"
        return super().why_illegal(rows, columns)
