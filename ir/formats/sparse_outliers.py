"""The few weights kept apart: values with 16-bit places inside tiles, zeros elsewhere. Made to be one part of a `composite`.

Tiles run row-major over the grid of tiles, so a kernel that computes one tile finds its values in one run. A kept weight costs 2 bytes of place besides
its value, where compressed sparse rows cost 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..errors import FormatError
from ..rounding import narrow
from ..spec import option
from .base import Payload, TensorSpec, WeightFormat
from .sparse import largest

MOST_PLACES = 2**16  # that 16 bits tell apart


class ValueType(Enum):
    """Storage type of the kept weights."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


@dataclass(frozen=True, kw_only=True)
class SparseOutliers(WeightFormat):
    """Exactly `count` weights, in tiles of `tile_rows` x `tile_columns` (the last ones of the grid may reach beyond the matrix); all others are 0."""

    count: int = option(ge=0)
    tile_rows: int = option(64, ge=1)
    tile_columns: int = option(64, ge=1)
    values: ValueType = ValueType.FLOAT16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile_rows * self.tile_columns > MOST_PLACES:
            raise FormatError(
                f"sparse_outliers: tiles of tile_rows={self.tile_rows} x tile_columns={self.tile_columns} have more than the {MOST_PLACES} places "
                "that 16 bits tell apart; use smaller tiles"
            )

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Tiles down and across."""
        return -(-rows // self.tile_rows), -(-columns // self.tile_columns)

    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """`tile_starts: [T+1] int32`, and per entry `positions: [count] uint16` and `values: [count]`.

        Tile t holds the entries from `tile_starts[t]` to `tile_starts[t+1]`, by ascending position: row in the tile * tile_columns + column in the tile.
        """
        down, across = self.grid(rows, columns)
        return {
            "tile_starts": TensorSpec((down * across + 1,), torch.int32),
            "positions": TensorSpec((self.count,), torch.uint16),
            "values": TensorSpec((self.count,), self._value_dtype),
        }

    @property
    def _value_dtype(self) -> torch.dtype:
        return getattr(torch, self.values.value)

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """No more weights can be kept than there are."""
        if self.count > rows * columns:
            return f"count={self.count} is more than the {rows * columns} weights; use count <= {rows * columns}"
        return None

    def pack(self, mask: Tensor, matrix: Tensor) -> dict[str, Tensor]:
        """Payload of the weights of `matrix: [N, K] float` where `mask: [N, K] bool` is true, `count` of them."""
        row, column = mask.nonzero(as_tuple=True)
        if len(row) != self.count:
            raise FormatError(f"{self.to_spec()}: the mask [{mask.shape[0]}, {mask.shape[1]}] keeps {len(row)} weights, expected count={self.count}")
        down, across = self.grid(*mask.shape)
        tile = row // self.tile_rows * across + column // self.tile_columns
        place = row % self.tile_rows * self.tile_columns + column % self.tile_columns
        order = (tile * MOST_PLACES + place).argsort()
        borders = torch.arange(down * across + 1, device=mask.device)
        return {
            "tile_starts": torch.searchsorted(tile[order], borders).to(torch.int32),
            "positions": place[order].to(torch.uint16),
            "values": narrow(matrix[row, column][order].float(), self._value_dtype),
        }

    def indices(self, payload: Payload, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Row and column of every entry, both `[count] int64`."""
        starts, place = payload["tile_starts"], payload["positions"].to(torch.int64)
        tile = torch.searchsorted(starts[1:], torch.arange(self.count, dtype=torch.int32, device=starts.device), right=True)
        across = self.grid(rows, columns)[1]
        row = tile // across * self.tile_rows + place // self.tile_columns
        return row, tile % across * self.tile_columns + place % self.tile_columns

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Keep the `count` largest magnitudes (equal ones: the first in row-major order)."""
        return self.pack(largest(matrix.abs(), self.count), matrix)

    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The values at their places, 0 elsewhere."""
        row, column = self.indices(payload, rows, columns)
        empty = torch.zeros(rows * columns, dtype=dtype, device=row.device)
        return empty.index_put((row * columns + column,), payload["values"].to(dtype)).reshape(rows, columns)
