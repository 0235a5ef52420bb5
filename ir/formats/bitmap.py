"""A bit for every weight and the values of the present ones: for unstructured sparsity of any density.

The bitmap of presence is that of SpInfer (Fan et al., EuroSys 2025), without its tiles: code generators lay tiles out when they lower, so the stored form does
not depend on a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..spec import option
from .sparse import Sparse, largest


@dataclass(frozen=True, kw_only=True)
class Bitmap(Sparse):
    """Exactly `count` weights are present, anywhere; 0 and all of them are legal."""

    count: int = option(ge=0)

    def kept_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """One run for the whole matrix."""
        return (self.count,)

    def choose(self, matrix: Tensor) -> Tensor:
        """The `count` largest magnitudes of the matrix."""
        return largest(matrix.abs(), self.count)

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """No more weights can be present than there are."""
        if self.count > rows * columns:
            return f"count={self.count} is more than the {rows * columns} weights; use count <= {rows * columns}"
        return super().why_illegal(rows, columns)
