"""Outliers as the kernels read them: for every row of tiles a list of slots, filled up to whole chunks, that one small extra product adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.errors import LowerError

CHUNK = 64  # slots that a program takes at a time
_ROW_BITS = 24  # where the row within the tile begins in a slot; the column is below


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Values `[C]` of a 16-bit float dtype to be added at `row: [C]`, `column: [C]` int64; a place may come twice."""

    row: Tensor
    column: Tensor
    value: Tensor


def slots_of(outliers: Outliers | None, rows: int, columns: int, tile_rows: int) -> dict[str, Tensor]:
    """Tensors of `Packed`: `slots [S] int32` (row in the tile << 24 | column, or -1), `slot_values [S] int16`, `slot_starts [row tiles + 1] int32` (chunks).

    Without outliers all three are empty. Order: by row of tiles, then column, so that neighbours read neighbouring data.
    """
    if outliers is None or not len(outliers.row):
        return {"slots": torch.empty(0, dtype=torch.int32), "slot_values": torch.empty(0, dtype=torch.int16), "slot_starts": torch.empty(0, dtype=torch.int32)}
    if columns > 1 << _ROW_BITS or tile_rows > 1 << (31 - _ROW_BITS):
        raise LowerError(f"outliers: {columns} columns in tiles of {tile_rows} rows; slots hold {1 << _ROW_BITS} columns and {1 << (31 - _ROW_BITS)} rows")
    block = outliers.row // tile_rows
    order = (block * columns + outliers.column).argsort(stable=True)
    counts = block.bincount(minlength=-(-rows // tile_rows))
    chunks = (counts + CHUNK - 1) // CHUNK
    starts = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[block[order]]
    place = starts[block[order]] * CHUNK + rank
    slots = torch.full((int(starts[-1]) * CHUNK,), -1, dtype=torch.int32, device=order.device)
    slots[place] = ((outliers.row % tile_rows) << _ROW_BITS | outliers.column)[order].to(torch.int32)
    values = torch.zeros_like(slots, dtype=torch.int16)
    values[place] = outliers.value[order].view(torch.int16)
    return {"slots": slots, "slot_values": values, "slot_starts": starts.to(torch.int32)}


def add_slots(dense: Tensor, slots: Tensor, slot_values: Tensor, slot_starts: Tensor, tile_rows: int) -> None:
    """Add the outliers to the decoded weight `dense: [N, K]` in place, in its dtype, of which the values are."""
    filled = slots >= 0
    block = torch.repeat_interleave(slot_starts.diff(), output_size=len(slots) // CHUNK).repeat_interleave(CHUNK)
    row = block * tile_rows + (slots >> _ROW_BITS)
    column = slots & ((1 << _ROW_BITS) - 1)
    dense.index_put_((row[filled], column[filled].long()), slot_values.view(dense.dtype)[filled], accumulate=True)
