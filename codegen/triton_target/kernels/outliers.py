"""The few weights kept apart: sparse columns of one more small product, in float32 sums with the rest."""

import triton
import triton.language as tl

from .bits import floats


@triton.jit
def add_outliers(acc, x, slots, slot_values, slot_starts, tokens, N, K, BM: tl.constexpr, SLOTS: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """`acc: [BM, BN] float32` plus this program's share of its row block's outliers, SLOTS at a time: `[BM, SLOTS] x [SLOTS, BN]`.

    A slot is `row in the block << 24 | column` (-1: empty). Column s of the left side holds value s at its row; row s of the right side is x at its column.
    """
    start, stop = tl.load(slot_starts + tl.program_id(0)), tl.load(slot_starts + tl.program_id(0) + 1)
    share = tl.cdiv(stop - start, tl.num_programs(2))
    first = start + share * tl.program_id(2)
    for chunk in range(first, tl.minimum(first + share, stop)):
        at = chunk * SLOTS + tl.arange(0, SLOTS)
        slot, value = tl.load(slots + at), tl.load(slot_values + at)
        column = slot & 0xFFFFFF
        b = tl.load(x + tokens[None, :] * K + column[:, None], mask=(tokens < N)[None, :] & (slot >= 0)[:, None], other=0)
        a = tl.where((slot >> 24)[None, :] == tl.arange(0, BM)[:, None], value[None, :], 0).to(tl.int16)
        if BF16 and not NATIVE:
            acc = tl.dot(floats(a.to(tl.int32), True), (b.to(tl.int32) << 16).to(tl.float32, bitcast=True), acc)
        else:
            acc = tl.dot(a.to(b.dtype, bitcast=True), b, acc)
    return acc
