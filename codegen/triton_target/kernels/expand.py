"""Pairs of kept values back at their columns, for each structure of a sparse tile.

Legend: a word `w` holds the presence bits of 32 columns of a row (bit j: column j). `T[i] = (v[i - 1], v[i])` is the table of overlapping pairs of the
kept values v. A pair of columns whose first has inclusive rank i reads T[i]: if the first is present it is v[i - 1], and then the second, if present, is v[i];
if the first is absent, the second, if present, is v[i]. What is absent is masked out.
"""

import triton
import triton.language as tl

from .bits import join4, pick_bytes, sign_mask, subtract_pairs


@triton.jit
def ranks(w):
    """Four words of byte lanes: lane j of word k is the rank of column 8j + 2k, kept columns up to and with it in the word; and the byte totals before each."""
    i0 = w & 0x01010101
    c1 = i0 + ((w >> 1) & 0x01010101)
    i1 = c1 + ((w >> 2) & 0x01010101)
    c2 = i1 + ((w >> 3) & 0x01010101)
    i2 = c2 + ((w >> 4) & 0x01010101)
    c3 = i2 + ((w >> 5) & 0x01010101)
    i3 = c3 + ((w >> 6) & 0x01010101)
    before = (i3 + ((w >> 7) & 0x01010101)) * 0x01010100
    return i0 + before, i1 + before, i2 + before, i3 + before


@triton.jit
def masks(w, NATIVE: tl.constexpr):
    """Masks of the 16 pairs of every word: `[...] -> [..., 2, 2, 2, 2]`."""
    return join4(_masks(w << 7, w << 6, NATIVE), _masks(w << 5, w << 4, NATIVE), _masks(w << 3, w << 2, NATIVE), _masks(w << 1, w, NATIVE))


@triton.jit
def _masks(low, high, NATIVE: tl.constexpr):
    return join4(sign_mask(low, high, 0, NATIVE), sign_mask(low, high, 1, NATIVE), sign_mask(low, high, 2, NATIVE), sign_mask(low, high, 3, NATIVE))


@triton.jit
def _lanes(y, base, MASK: tl.constexpr):
    """The four byte lanes of `y` plus `base`: `[NW] -> [NW, 4]`."""
    return ((y[:, None] >> (8 * tl.arange(0, 4))[None, :]) & MASK) | base[:, None]


@triton.jit
def expand_balanced(w, r, NW: tl.constexpr, KEEP: tl.constexpr, NATIVE: tl.constexpr):
    """Pairs `[NW * 16]` of words `w: [NW]` with `KEEP` kept values each, `r: [NW * KEEP / 2]` pairs of them. Ranks wrap inside a word: T[0] = T[KEEP]."""
    PAIRS: tl.constexpr = KEEP // 2
    a, b = tl.split(tl.reshape(r, [NW, PAIRS // 2, 2]))
    previous = rotate(b, NW, PAIRS // 2)
    first = ((previous >> 16) & 0xFFFF) | (a << 16)
    second = ((a >> 16) & 0xFFFF) | (b << 16)
    table = tl.reshape(join4(first, a, second, b), [NW * KEEP])
    base = tl.arange(0, NW) * KEEP
    y0, y1, y2, y3 = ranks(w)
    MASK: tl.constexpr = KEEP - 1
    index = join4(_lanes(y0, base, MASK), _lanes(y1, base, MASK), _lanes(y2, base, MASK), _lanes(y3, base, MASK))
    return tl.gather(table, tl.reshape(index, [NW * 16]), 0) & tl.reshape(masks(w, NATIVE), [NW * 16])


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
def expand_bitmap(w, starts, v, offset, NW: tl.constexpr, SHIFTED: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """Pairs `[NW * 16]` of words `w: [NW]`, `offset: [NW]` pairs subtracted when SHIFTED. Word i's values follow place `starts[i]` of `v: [..] int16`."""
    y0, y1, y2, y3 = ranks(w)
    index = tl.reshape(join4(_places(y0, starts), _places(y1, starts), _places(y2, starts), _places(y3, starts)), [NW * 16])
    both = tl.gather(v, tl.reshape(tl.join(index, index + 1), [NW * 32]), 0)
    low, high = tl.split(tl.reshape(both, [NW * 16, 2]))
    p = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    if SHIFTED:
        p = tl.reshape(subtract_pairs(tl.reshape(p, [NW, 16]), offset[:, None], BF16, NATIVE), [NW * 16])
    return p & tl.reshape(masks(w, NATIVE), [NW * 16])


@triton.jit
def _places(y, starts):
    """Places of the four lanes: the rank of a column is at least 1 where it is present, so place `starts` itself is read only to be masked."""
    return ((y[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255) + starts[:, None]
