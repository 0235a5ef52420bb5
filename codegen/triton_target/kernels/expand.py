"""Pairs of kept values back at their columns, for each structure of a sparse tile.

Legend: a word `w` holds the presence bits of 32 columns of a row (bit j: column j). `T[i] = (v[i - 1], v[i])` is the table of overlapping pairs of the
kept values v. A pair of columns whose first has inclusive rank i reads T[i]: if the first is present it is v[i - 1], and then the second, if present, is v[i];
if the first is absent, the second, if present, is v[i]. What is absent is masked out.
"""

import triton
import triton.language as tl

from .bits import join4, pick_bytes, population, sign_mask, subtract_pairs


@triton.jit
def ranks(word, NATIVE: tl.constexpr):
    """Kept columns up to the first of each pair, `[NW, 16]` words -> `[NW, 16]`: one lane a pair, population counts."""
    below = (2 << (2 * tl.arange(0, 16))) - 1
    return population(word & below[None, :], NATIVE)


@triton.jit
def masks(w, NW: tl.constexpr, WGMMA: tl.constexpr, NATIVE: tl.constexpr):
    """Masks of the 16 pairs of words `w: [NW]`, `[NW * 16]`: 0xFFFF in the half of every column that is present.

    With WGMMA a lane holds pairs c, c + 4, c + 8 and c + 12: one word, shifted twice, serves all four. Elsewhere it holds others, and every pair is shifted.
    """
    if WGMMA:
        shift = 2 * tl.arange(0, 4)
        low, high = w[:, None] << (7 - shift)[None, :], w[:, None] << (6 - shift)[None, :]
        lanes = join4(sign_mask(low, high, 0, NATIVE), sign_mask(low, high, 1, NATIVE), sign_mask(low, high, 2, NATIVE), sign_mask(low, high, 3, NATIVE))
        return tl.reshape(tl.permute(tl.reshape(lanes, [NW, 4, 4]), [0, 2, 1]), [NW * 16])
    else:
        shift = 2 * tl.arange(0, 16)
        word = tl.broadcast_to(w[:, None], [NW, 16])
        return tl.reshape(sign_mask(word << (31 - shift)[None, :], word << (30 - shift)[None, :], 3, NATIVE), [NW * 16])


@triton.jit
def rows_of_values(q, ROWS: tl.constexpr, WORDS: tl.constexpr, LANE: tl.constexpr, COUNT: tl.constexpr, LOAD: tl.constexpr):
    """Stored values `[COUNT]` of a tile of ROWS rows of WORDS words, as lanes load them (`values_by_lanes` of `by_eight_rows`) -> row-major. Nothing moves."""
    NW: tl.constexpr = ROWS * WORDS
    EACH: tl.constexpr = COUNT // NW
    if EACH < LOAD:
        q = tl.permute(tl.reshape(q, [NW // LANE, LANE, EACH]), [1, 0, 2])
    else:
        q = tl.permute(tl.reshape(q, [LANE, EACH // LOAD, NW // LANE, LOAD]), [0, 2, 1, 3])
    return tl.reshape(tl.permute(tl.reshape(q, [ROWS // 8, WORDS, 8, EACH]), [0, 2, 1, 3]), [COUNT])


@triton.jit
def places(rank, ROWS: tl.constexpr, WORDS: tl.constexpr, KEEP: tl.constexpr):
    """Where the pair of each rank stands in the table `[KEEP / 4, words as by_eight_rows, 4]`: eight rows and four ranks are 32 banks."""
    word = tl.arange(0, ROWS * WORDS)
    row = word // WORDS
    at = ((row // 8 * WORDS + word % WORDS) * 8 + row % 8) * 4
    return ((rank & (KEEP - 4)) * (ROWS * WORDS)) | (rank & 3) | at[:, None]


@triton.jit
def expand_balanced(
    w,
    r,
    offset,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    KEEP: tl.constexpr,
    SHIFTED: tl.constexpr,
    WGMMA: tl.constexpr,
    BF16: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Pairs `[NW * 16]` of words `w: [NW]` with `KEEP` kept values each, `r: [NW * KEEP / 2]` pairs of them, `offset: [NW]` pairs subtracted when SHIFTED.

    Ranks wrap inside a word: T[0] = T[KEEP].
    """
    NW: tl.constexpr = ROWS * WORDS
    PAIRS: tl.constexpr = KEEP // 2
    a, b = tl.split(tl.reshape(r, [NW, PAIRS // 2, 2]))
    previous = rotate(b, NW, PAIRS // 2)
    first = ((previous >> 16) & 0xFFFF) | (a << 16)
    second = ((a >> 16) & 0xFFFF) | (b << 16)
    table = tl.reshape(join4(first, a, second, b), [ROWS // 8, 8, WORDS, KEEP // 4, 4])
    table = tl.reshape(tl.permute(table, [3, 0, 2, 1, 4]), [NW * KEEP])
    word = tl.broadcast_to(w[:, None], [NW, 16])
    p = tl.gather(table, tl.reshape(places(ranks(word, NATIVE), ROWS, WORDS, KEEP), [NW * 16]), 0)
    if SHIFTED:
        p = tl.reshape(subtract_pairs(tl.reshape(p, [NW, 16]), offset[:, None], BF16, NATIVE), [NW * 16])
    return p & masks(w, NW, WGMMA, NATIVE)


@triton.jit
def expand_2to4(positions, r, selectors, NW: tl.constexpr, NATIVE: tl.constexpr):
    """Pairs `[NW * 16]` of groups of four columns with two kept values, `r: [NW * 8]`; a word of `positions: [NW]` has the two 2-bit places of eight groups.

    `selectors: [16]` says for every nibble of places which bytes of the kept pair go where (low half: columns 0 and 1, high half: 2 and 3; see `pick_bytes`).
    """
    place = tl.reshape((positions[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 15, [NW * 8])
    selector = tl.gather(selectors, place, 0)
    zero = tl.zeros_like(selector)
    return tl.reshape(tl.join(pick_bytes(r, zero, selector, NATIVE), pick_bytes(r, zero, selector >> 16, NATIVE)), [NW * 16])


@triton.jit
def rotate(b, NW: tl.constexpr, COUNT: tl.constexpr):
    """`[NW, COUNT]` moved right by one, the last first; COUNT of 1, 2, 4 or 8. All in registers."""
    if COUNT == 1:
        return b
    elif COUNT == 2:
        x, y = tl.split(b)
        return tl.join(y, x)
    else:
        even, odd = tl.split(tl.reshape(b, [NW, COUNT // 2, 2]))
        return tl.reshape(tl.join(rotate(odd, NW, COUNT // 2), even), [NW, COUNT])


@triton.jit
def expand_bitmap(w, starts, v, offset, NW: tl.constexpr, SHIFTED: tl.constexpr, WGMMA: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """Pairs `[NW * 16]` of words `w: [NW]`, `offset: [NW]` pairs subtracted when SHIFTED. Word i's values follow place `starts[i]` of `v: [..] int16`.

    One lane a pair of columns: lanes side by side read values side by side.
    """
    mask = masks(w, NW, WGMMA, NATIVE)  # first: later it would cost registers
    word = tl.broadcast_to(w[:, None], [NW, 16])
    at = ranks(word, NATIVE) + tl.broadcast_to(starts[:, None], [NW, 16])
    low, high = tl.split(tl.reshape(tl.gather(v, tl.reshape(tl.join(at, at + 1), [NW * 32]), 0), [NW * 16, 2]))
    p = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    if SHIFTED:
        p = tl.reshape(subtract_pairs(tl.reshape(p, [NW, 16]), offset[:, None], BF16, NATIVE), [NW * 16])
    return p & mask
