"""A bit for every weight and the values of the present ones: for unstructured sparsity of any density.

The bitmap of presence is that of SpInfer (Fan et al., EuroSys 2025), without its tiles: code generators lay tiles out when they lower, so the stored form does
not depend on a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import option
from .base import Payload, TensorSpec
from .bitpack import pack, packed_width, unpack
from .sparse import Sparse, largest


@dataclass(frozen=True, kw_only=True)
class Bitmap(Sparse):
    """Exactly `count` weights are present, anywhere; 0 and all of them are legal."""

    count: int = option(ge=0)

    def kept_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """One run for the whole matrix."""
        return (self.count,)

    def presence_spec(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """`mask: [N, ceil(K/8)] uint8`, bit j of byte i for column 8i + j."""
        return {"mask": TensorSpec((rows, packed_width(columns, 1)), torch.uint8)}

    def pack_presence(self, present: Tensor) -> dict[str, Tensor]:
        """Eight columns a byte."""
        return {"mask": pack(present.to(torch.uint8), 1)}

    def unpack_presence(self, payload: Payload, rows: int, columns: int) -> Tensor:
        """`[N, K] bool`."""
        return unpack(payload["mask"], 1, columns).bool()

    def choose(self, matrix: Tensor) -> Tensor:
        """The `count` largest magnitudes of the matrix."""
        return largest(matrix.abs(), self.count)

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """No more weights can be present than there are."""
        if self.count > rows * columns:
            return f"count={self.count} is more than the {rows * columns} weights; use count <= {rows * columns}"
        return super().why_illegal(rows, columns)
