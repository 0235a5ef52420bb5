"""Pairs of stored values from their words: 16-bit floats as they are, affine codes, codes into tables.

Legend: `q` holds stored words. Codes are laid out so that one shift and one mask bring two neighbours into the halves of a word: with 4 bits, codes 0, 2, 4, 6
of a word's eight stand at bits 0, 4, 8, 12 and codes 1, 3, 5, 7 at bits 16, 20, 24, 28; with 8 bits, codes 0, 2 at bits 0, 8 and codes 1, 3 at bits 16, 24. An
exponent put over a code makes it the float `MAGIC + code`; `MAGIC + zero point` is subtracted where zero points are known (1024 in float16; 128 in bfloat16,
whose 8-bit codes have no room and are converted instead, with `MAGIC` 0).
"""

import triton
import triton.language as tl

from .bits import bits16, join4, pick_bytes, subtract_pairs


@triton.jit
def code_pairs(q, COUNT: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """`q: [COUNT * BITS / 16] int32` words -> `[COUNT] int32` pairs of `MAGIC + code` (16 bits: of the floats themselves)."""
    if BITS == 16:
        return q
    elif BITS == 4:
        EXPONENT: tl.constexpr = 0x43004300 if BF16 else 0x64006400
        p = join4((q & 0x000F000F) | EXPONENT, ((q >> 4) & 0x000F000F) | EXPONENT, ((q >> 8) & 0x000F000F) | EXPONENT, ((q >> 12) & 0x000F000F) | EXPONENT)
        return tl.reshape(p, [COUNT])
    elif BF16:
        return tl.reshape(tl.join(_exact_pairs(q, 16, 0), _exact_pairs(q >> 8, 16, 0)), [COUNT])
    else:
        return tl.reshape(tl.join((q & 0x00FF00FF) | 0x64006400, ((q >> 8) & 0x00FF00FF) | 0x64006400), [COUNT])


@triton.jit
def _exact_pairs(q, SHIFT: tl.constexpr, BIAS: tl.constexpr):
    """bfloat16 pairs `byte - BIAS` of the bytes at bits 0 and SHIFT: exact as float32 over 2^23, and as bfloat16."""
    low = ((q & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + BIAS)
    high = (((q >> SHIFT) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + BIAS)
    return bits16(low, True) | (bits16(high, True) << 16)


@triton.jit
def shared_pairs(q, t0, t1, t2, t3, COUNT: tl.constexpr, ENTRIES: tl.constexpr, NATIVE: tl.constexpr):
    """`q: [COUNT / 4] int32`, eight 4-bit codes in order each -> `[COUNT] int32` pairs from the matrix's table of 16 floats.

    `t0 .. t3: int64` hold four entries each, their low bytes in the low word and their high bytes in the high one. All in registers, by byte permutes: a gather
    of pairs from shared memory takes fewer instructions and, on an H100, half as much time again, for its lanes meet in banks.
    """
    a, b = _table_pairs(q, t0, t1, t2, t3, ENTRIES, NATIVE)
    c, d = _table_pairs(q >> 16, t0, t1, t2, t3, ENTRIES, NATIVE)
    return tl.reshape(join4(a, b, c, d), [COUNT])


@triton.jit
def _table_pairs(codes, t0, t1, t2, t3, ENTRIES: tl.constexpr, NATIVE: tl.constexpr):
    """The two pairs of the four codes in the low half of `codes`."""
    low = _entries(codes, t0.to(tl.int32), t1.to(tl.int32), t2.to(tl.int32), t3.to(tl.int32), ENTRIES, NATIVE)
    high = _entries(codes, (t0 >> 32).to(tl.int32), (t1 >> 32).to(tl.int32), (t2 >> 32).to(tl.int32), (t3 >> 32).to(tl.int32), ENTRIES, NATIVE)
    first, second = tl.full(low.shape, 0x5140, tl.int32), tl.full(low.shape, 0x7362, tl.int32)
    return pick_bytes(low, high, first, NATIVE), pick_bytes(low, high, second, NATIVE)


@triton.jit
def row_pairs(q, t0, t1, t2, t3, BM: tl.constexpr, WORDS: tl.constexpr, ENTRIES: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """`q: [BM * WORDS] int32`, eight 4-bit codes in order each -> `[BM * WORDS * 4]` pairs of the integers that each row's table holds.

    `t0 .. t3: [BM] int32` are the table's 16 entries as bytes, 128 added (t0 alone with 4 entries, t0 and t1 with 8).
    """
    codes = tl.reshape(q, [BM, WORDS])
    first = _entries(codes, t0[:, None], t1[:, None], t2[:, None], t3[:, None], ENTRIES, NATIVE)
    second = _entries(codes >> 16, t0[:, None], t1[:, None], t2[:, None], t3[:, None], ENTRIES, NATIVE)
    a, b = _byte_pairs(first, BF16, NATIVE)
    c, d = _byte_pairs(second, BF16, NATIVE)
    return tl.reshape(join4(a, b, c, d), [BM * WORDS * 4])


@triton.jit
def _entries(codes, t0, t1, t2, t3, ENTRIES: tl.constexpr, NATIVE: tl.constexpr):
    """The bytes of the four codes in the low half of `codes`."""
    low = codes & 0x7777
    if ENTRIES <= 8:
        return pick_bytes(t0, t1, low, NATIVE)
    else:
        return pick_bytes(pick_bytes(t0, t1, low, NATIVE), pick_bytes(t2, t3, low, NATIVE), ((codes >> 1) & 0x4444) | 0x3210, NATIVE)


@triton.jit
def _byte_pairs(four, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """Two words of pairs `byte - 128` of four bytes."""
    if BF16:
        return _exact_pairs(four, 8, 128), _exact_pairs(four >> 16, 8, 128)
    else:
        exponent = tl.full(four.shape, 0x64646464, tl.int32)
        bias = tl.full(four.shape, 0x64806480, tl.int32)
        a = subtract_pairs(pick_bytes(four, exponent, tl.full(four.shape, 0x4140, tl.int32), NATIVE), bias, False, NATIVE)
        return a, subtract_pairs(pick_bytes(four, exponent, tl.full(four.shape, 0x4342, tl.int32), NATIVE), bias, False, NATIVE)


@triton.jit
def halves(p, COUNT: tl.constexpr):
    """Pairs `[COUNT] int32` -> `[2 * COUNT] int16`."""
    return tl.reshape(tl.join(p.to(tl.int16), (p >> 16).to(tl.int16)), [2 * COUNT])
