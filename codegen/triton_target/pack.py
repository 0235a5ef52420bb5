"""From presence, codes and scales of a weight to the layout of one kernel variant."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.errors import LowerError
from .layout import (
    WHOLE_ROW,
    WORD,
    Packed,
    Structure,
    Tile,
    Values,
    by_eight_rows,
    byte_selectors,
    cut,
    fragment_order,
    kept_first,
    presence_words,
    stored_words,
    two_of_four,
    two_of_four_mask,
    values_by_lanes,
    word_room,
)
from .slots import Outliers, slots_of

MAGIC = {torch.float16: 1024.0, torch.bfloat16: 128.0}  # what an exponent put over a 4-bit code adds to it
UNIT_BYTES = 16  # bitmaps' tiles begin on these


@dataclass(frozen=True, kw_only=True)
class Source:
    """A weight `[N, K]` taken apart: `weight = value * scale` where present.

    `values: [N, K]` are 16-bit floats, or codes as uint8. For affine codes the value is `code - zero[n, g]` with whole zero points; for codes into tables it is
    the entry (`table: [T, E]`, one table, or one of 8-bit integers a row). `scale` (float16 or float32) and `zero` are `[N, G]`, groups of `group` columns;
    None: 1, no zero point, one group. `outliers` are added to all that.
    """

    kind: Values
    values: Tensor
    dtype: torch.dtype
    present: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    table: Tensor | None = None
    group: int | None = None
    outliers: Outliers | None = None


def pack(source: Source, structure: Structure, tile: Tile) -> Packed:
    """Lay `source` out for `structure`; LowerError where it does not fit. Nothing is rounded."""
    tile = _fitting(source, tile)
    rows, columns = source.values.shape
    present = source.present if source.present is not None else torch.ones_like(source.values, dtype=torch.bool)
    tiles, taken = cut(_absent_as_zero(source, present), tile), cut(present, tile)
    grid, shift = _grid(source)
    packed = Packed(
        structure=structure, values_kind=source.kind, rows=rows, columns=columns, tile=tile, dtype=source.dtype, pairs=tile.rows * tile.columns // 2,
        entries=source.table.shape[1] if source.table is not None else 0, group=(source.group or 0) // tile.columns or WHOLE_ROW,
        words=_none(torch.int32), starts=_none(torch.int16), offsets=_none(torch.int32), values=_none(torch.int32),
        codebook=_codebook(source), grid=grid, zeroed=source.zero is not None, shift=shift,
        **slots_of(source.outliers, rows, columns, tile.rows),
    )  # fmt: skip
    return {Structure.DENSE: _dense, Structure.TWO_OF_FOUR: _pairs_of_four, Structure.BALANCED: _balanced, Structure.BITMAP: _bitmap}[structure](
        packed, tiles, taken
    )


def _none(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


def _absent_as_zero(source: Source, present: Tensor) -> Tensor:
    """Values with what stands for 0 wherever nothing is present: 2:4 groups with fewer than two fill up with them. 16-bit floats as int16."""
    if source.kind is Values.HALF:
        return source.values.masked_fill(~present, 0.0).view(torch.int16)
    if source.zero is None:
        return source.values
    columns = source.values.shape[1]
    zero = source.zero.round().to(torch.uint8).repeat_interleave(source.group or columns, 1)[:, :columns]
    return torch.where(present, source.values, zero)


def _fitting(source: Source, tile: Tile) -> Tile:
    """A tile no wider than a group of columns with scales of its own, and groups that are whole tiles."""
    columns = min(tile.columns, source.group or tile.columns)
    if columns < WORD or columns & (columns - 1) or (source.group or 0) % columns:
        raise LowerError(f"groups of {source.group} columns: expected a power of two from {WORD}, or a multiple of {tile.columns}")
    return replace(tile, columns=columns)


def _codebook(source: Source) -> Tensor:
    """`[N, 4] int32` rows of bytes with 128 added, or `[4] int64` of a shared table: the low bytes of four entries, then their high bytes."""
    if source.table is None:
        return _none(torch.int32)
    if source.kind is Values.ROWS:
        entries = (source.table.to(torch.int32) + 128).to(torch.uint8)
        return F.pad(entries, (0, 16 - entries.shape[1])).contiguous().view(torch.int32)
    entries = F.pad(source.table[0].to(source.dtype), (0, 16 - source.table.shape[1]))
    return entries.contiguous().view(torch.uint8).unflatten(0, (4, 4, 2)).transpose(1, 2).flatten().view(torch.int64)


def _grid(source: Source) -> tuple[Tensor, int]:
    """Scales and what to subtract from `MAGIC + code`, `[N, G, 1 or 2] int32`; and the pair to subtract everywhere when all zero points are equal, else 0."""
    if source.scale is None:
        return _none(torch.int32), 0
    half, shift = torch.zeros_like(source.scale, dtype=torch.int16), 0
    if source.zero is not None:
        magic = 0.0 if source.kind is Values.CODE8 and source.dtype is torch.bfloat16 else MAGIC[source.dtype]
        half = (source.zero + magic).to(source.dtype).view(torch.int16)
        first = int(half[0, 0]) & 0xFFFF
        shift = first | first << 16 if bool((half == half[0, 0]).all()) else 0
    if source.scale.dtype is torch.float16:
        return torch.stack([source.scale.view(torch.int16), half], -1).contiguous().view(torch.int32), shift
    return torch.stack([source.scale.float().contiguous().view(torch.int32), half.to(torch.int32) & 0xFFFF], -1), shift


def _dense(packed: Packed, tiles: Tensor, taken: Tensor) -> Packed:
    kind = packed.values_kind
    return replace(packed, values=stored_words(fragment_order(tiles, kind.bits), kind).flatten())


def _pairs_of_four(packed: Packed, tiles: Tensor, taken: Tensor) -> Packed:
    words = two_of_four(taken)
    kept = _kept(packed, tiles, two_of_four_mask(words), 4, 2)
    codebook = byte_selectors(words.device)
    if packed.codebook.numel():
        raise LowerError("2:4 with tables: not built, as both need a table on chip; store the weight as balanced or bitmap")
    return replace(packed, pairs=packed.pairs // 2, words=words.flatten(), values=stored_words(kept, packed.values_kind).flatten(), codebook=codebook)


def _balanced(packed: Packed, tiles: Tensor, taken: Tensor) -> Packed:
    """Room for a power of two of values a word, the largest count in the matrix or more."""
    most = int(taken.unflatten(-1, (-1, WORD)).sum(-1).max())
    keep = word_room(most, packed.values_kind.bits)
    kept = by_eight_rows(_kept(packed, tiles, taken, WORD, keep).unflatten(-1, (-1, keep)))
    values = stored_words(values_by_lanes(kept, packed.values_kind.bits), packed.values_kind)
    return replace(packed, pairs=packed.pairs * keep // WORD, words=presence_words(taken).flatten(), values=values.flatten())


def _kept(packed: Packed, tiles: Tensor, taken: Tensor, width: int, room: int) -> Tensor:
    """Kept values of every run of `width` columns, `room` places each: `[..., C / width * room]`."""
    return kept_first(tiles.unflatten(-1, (-1, width)), taken.unflatten(-1, (-1, width)), room).flatten(-2)


def _bitmap(packed: Packed, tiles: Tensor, taken: Tensor) -> Packed:
    """Values of a tile word by word (`by_eight_rows`) behind one unused place; every tile begins on 16 bytes."""
    words, shape = presence_words(taken), taken.shape
    tiles, taken = (by_eight_rows(t.unflatten(-1, (-1, WORD))).flatten(-2) for t in (tiles, taken))
    counts = taken.unflatten(-1, (-1, WORD)).sum(-1)  # [row tiles, column tiles, words of a tile]
    starts = (counts.cumsum(-1) - counts).unflatten(-1, (shape[-2] // 8, -1, 8)).transpose(-1, -2)
    totals = counts.sum(-1).flatten()
    unit = 8 * UNIT_BYTES // packed.values_kind.bits
    units = (totals + 1 + unit - 1) // unit
    offsets = F.pad(units.cumsum(0), (1, 0))
    flat, present = tiles.flatten(0, 1), taken.flatten(0, 1)
    base = (offsets[:-1] * unit + 1).unsqueeze(1)
    stream = flat.new_zeros(int(offsets[-1]) * unit)
    stream[(base + present.cumsum(1) - 1)[present]] = flat[present]
    room = max(16, 1 << (int(totals.max()) + 2 - 1).bit_length())  # one place before the first value and one after the last are read
    values = stream if packed.values_kind is Values.HALF else stored_words(stream, packed.values_kind)
    return replace(packed, pairs=room // 2, words=words.flatten(), starts=starts.to(torch.int16).flatten(), offsets=offsets.to(torch.int32), values=values)
