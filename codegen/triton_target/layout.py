"""Weights as the kernels read them: tiles one after another, presence words, values or codes in the order in which one shift brings neighbours together.

A `Packed` weight holds device tensors and the compile-time facts of the kernel variant that reads them. It is derived from a stored payload when a program
is lowered, and never saved: tile sizes may change with the device, the stored formats do not. All functions are exact and deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.errors import LowerError

TILED = ("words", "starts", "offsets", "values", "codebook", "grid")  # tensors of a packed weight that hold its tiles, as the kernels take them
TENSORS = (*TILED, "slots", "slot_values", "slot_starts")
LOAD_BITS = 128  # that a lane loads at a time
WORD = 32  # columns of one presence word
SMALLEST_KEEP = 4  # places of a balanced word
WHOLE_ROW = 1 << 20  # tiles of a group that never ends
_PAIR_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}  # codes of a word from its low bits up


class Structure(Enum):
    """How a tile says which weights are present."""

    DENSE = "dense"
    TWO_OF_FOUR = "2:4"
    BALANCED = "balanced"
    BITMAP = "bitmap"


class Values(Enum):
    """What is stored for a present weight."""

    HALF = "half"  # a 16-bit float
    CODE4 = "code4"
    CODE8 = "code8"
    SHARED = "shared"  # a 4-bit code into the matrix's table
    ROWS = "rows"  # a 4-bit code into the row's table of 8-bit integers

    @property
    def bits(self) -> int:
        """Bits of one stored value."""
        return {"half": 16, "code8": 8}.get(self.value, 4)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Rows and columns that one program rebuilds at a time."""

    rows: int = 64
    columns: int = 128


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight `[rows, columns]` for the kernels. `pairs`: pairs of stored values that a tile has room for.

    `words: [tiles, words a tile] int32`, `starts` likewise int16 and `offsets: [tiles + 1] int32` (16-byte units) for bitmaps, `values` the stored words of all
    tiles, `codebook` tables (2:4: byte selectors), `grid: [rows, groups, 1 or 2]` scales and offsets, `group` K-tiles sharing them (one word:
    a float16 scale, and a 16-bit float to subtract in the high half; two: a float32 scale, and the offset). `zeroed`: offsets count; `shift` is the pair of
    floats to subtract when all of them are equal. `slots`, `slot_values`, `slot_starts`: outliers (`slots_of`). Empty tensors stand for what there is not.
    """

    structure: Structure
    values_kind: Values
    rows: int
    columns: int
    tile: Tile
    dtype: torch.dtype
    pairs: int
    entries: int
    group: int
    zeroed: bool
    shift: int
    words: Tensor
    starts: Tensor
    offsets: Tensor
    values: Tensor
    codebook: Tensor
    grid: Tensor
    slots: Tensor
    slot_values: Tensor
    slot_starts: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors in the order the kernels take them."""
        return tuple(getattr(self, name) for name in TENSORS)

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def tiles(self) -> int:
        """Tiles along K."""
        return -(-self.columns // self.tile.columns)

    @property
    def groups(self) -> int:
        """Groups of columns that have scales of their own."""
        return self.grid.shape[1] if self.grid.dim() == 3 else 1


def word_room(most: int, bits: int) -> int:
    """Places of a balanced word that holds `most` values of `bits` bits: a power of two, 32 bits at least."""
    return max(SMALLEST_KEEP, WORD // bits, 1 << (most - 1).bit_length())


def lane_words(words: int) -> int:
    """Words of a tile that one lane of the kernel holds: those `words / lane_words` apart, so that lanes side by side hold words side by side."""
    return max(1, min(4, words // 128))


def by_eight_rows(words: Tensor) -> Tensor:
    """Words `[..., rows, words of a row, places]` -> `[..., words, places]`, the same word of eight rows side by side.

    The lanes of a matrix instruction hold eight rows: so they read different banks of shared memory.
    """
    return words.unflatten(-3, (-1, 8)).transpose(-2, -3).flatten(-4, -2)


def values_by_lanes(values: Tensor, bits: int) -> Tensor:
    """Values `[..., words, places]` of `bits` bits, flat, as lanes load them, 16 bytes at a time: each lane gets the values of its own words."""
    *_, words, places = values.shape
    apart = values.unflatten(-2, (lane_words(words), -1))  # [..., words of a lane, lanes, places]
    if places * bits < LOAD_BITS:
        return apart.transpose(-2, -3).flatten(-3)
    return apart.unflatten(-1, (-1, LOAD_BITS // bits)).transpose(-2, -3).flatten(-4)


def fragment_order(tiles: Tensor, bits: int) -> Tensor:
    """Dense tiles `[..., rows, columns]` of `bits` bits, flat, as the lanes of a matrix instruction hold them (kernels/fragments.py)."""
    columns = min(tiles.shape[-1], max(32, 2 * LOAD_BITS // bits))  # a lane has 8 of 32 columns of 2 rows
    blocks = tiles.unflatten(-1, (-1, columns // 32, 2, 2, 4, 2)).unflatten(-7, (-1, 2, 8))  # [..., R, 8s, r | chunks, 32s, 16s, 8s, c, 1s]
    return blocks.movedim((-6, -9, -7, -2, -5, -8, -4, -3, -1), tuple(range(-9, 0))).flatten(-9)


def cut(matrix: Tensor, tile: Tile) -> Tensor:
    """`[N, K] -> [row tiles, column tiles, rows, columns]`, padded with zeros (False)."""
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % tile.columns, 0, -rows % tile.rows))
    return padded.unflatten(0, (-1, tile.rows)).unflatten(2, (-1, tile.columns)).transpose(1, 2).contiguous()


def presence_words(present: Tensor) -> Tensor:
    """`[..., C] bool -> [..., C / 32] int32`, bit j for column j."""
    bits = present.unflatten(-1, (-1, WORD)).to(torch.int64) << torch.arange(WORD, device=present.device)
    return _int32(bits.sum(-1))


def _int32(word: Tensor) -> Tensor:
    """Non-negative int64 words below 2^32 with the same 32 bits."""
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def stored_words(values: Tensor, kind: Values) -> Tensor:
    """Values `[..., C]` (16-bit floats, or codes as uint8) as the words that a kernel loads."""
    if kind is Values.HALF:
        return values.contiguous().view(torch.int32)
    order = tuple(range(8)) if kind in (Values.SHARED, Values.ROWS) else _PAIR_ORDER[kind.bits]
    codes = values.unflatten(-1, (-1, len(order)))[..., list(order)].to(torch.int64)
    return _int32((codes << (kind.bits * torch.arange(len(order), device=values.device))).sum(-1))


def kept_first(values: Tensor, present: Tensor, room: int) -> Tensor:
    """The present values of every run `[..., C]`, in order, in `room` places `[..., room]`; the rest is zero."""
    place = (present.cumsum(-1) - 1).masked_fill_(~present, room)
    out = values.new_zeros(*values.shape[:-1], room + 1)
    return out.scatter_(-1, place, values)[..., :room]


def two_of_four(present: Tensor) -> Tensor:
    """Words of places for groups of four columns with at most two present, `[..., C] bool -> [..., C / 32] int32`: eight nibbles, two 2-bit places each."""
    quads = present.unflatten(-1, (-1, 4)).int()
    if bool((quads.sum(-1) > 2).any()):
        raise LowerError("2:4: a group of four columns has more than two weights; store it as a bitmap")
    # Fewer than two present: free columns fill up, the lowest first; their values are zeros.
    rank = (quads * 4 - torch.arange(4, device=present.device)).argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    nibbles = (rank[..., 0] | (rank[..., 1] << 2)).unflatten(-1, (-1, 8))
    return _int32((nibbles << (4 * torch.arange(8, device=present.device))).sum(-1))


def two_of_four_mask(words: Tensor) -> Tensor:
    """Inverse of `two_of_four`: the two columns of every group, `[..., W] int32 -> [..., 32 W] bool`."""
    nibbles = (words.to(torch.int64).unsqueeze(-1) >> (4 * torch.arange(8, device=words.device))) & 15
    columns = torch.arange(4, device=words.device)
    taken = ((nibbles & 3).unsqueeze(-1) == columns) | ((nibbles >> 2).unsqueeze(-1) == columns)
    return taken.flatten(-3)


def byte_selectors(device: torch.device) -> Tensor:
    """`[16] int32`: for two places `p0 | p1 << 2`, which bytes of the kept pair (4: a zero) make columns 0 and 1 (low half), and 2 and 3 (high half)."""
    out = []
    for nibble in range(16):
        columns = [0x44] * 4
        columns[nibble & 3], columns[nibble >> 2] = 0x10, 0x32
        out.append(sum(c << (8 * i) for i, c in enumerate(columns)))
    return _int32(torch.tensor(out, dtype=torch.int64, device=device))
