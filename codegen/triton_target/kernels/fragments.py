"""Dense tiles stored in the order in which the lanes of a matrix instruction hold their left side, so that no value passes through shared memory.

A 16 x 16 block of the left side lies in a warp as (PTX, mma.m16n8k16 and wgmma with A in registers): lane `4 r + c` holds rows `r` and `r + 8` at columns
`2 c`, `2 c + 1` and those plus 8. Stored order, slowest first: chunks of COLUMNS columns, blocks of 16 rows, r, c, blocks of 32 columns in the chunk, row + 8,
column + 16, column + 8, column + 1 (`fragment_order` of ../layout.py writes it). A lane then loads 16 bytes at a time, all its own. Marlin (Frantar et al.,
2024) stores 4-bit weights in such an order; here it is one for any tile, and reshapes and permutations of register names undo it.
"""

import triton
import triton.language as tl


@triton.jit
def pairs_of_fragments(p, BM: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr):
    """Pairs `[BM * BK / 2]` in stored order -> row-major; COLUMNS of a chunk, cut to BK. Nothing moves."""
    WIDE: tl.constexpr = COLUMNS if COLUMNS < BK else BK
    p = tl.reshape(p, [BK // WIDE, BM // 16, 8, 4, WIDE // 32, 2, 2, 2])
    return tl.reshape(tl.permute(p, [1, 5, 2, 0, 4, 6, 7, 3]), [BM * BK // 2])


@triton.jit
def rows_of_fragments(q, BM: tl.constexpr, BK: tl.constexpr):
    """Words of eight 4-bit codes in stored order -> row by row, a row's words in the order of (blocks of 32 columns, c)."""
    WIDE: tl.constexpr = 64 if BK > 64 else BK
    q = tl.reshape(q, [BK // WIDE, BM // 16, 8, 4, WIDE // 32, 2])
    return tl.reshape(tl.permute(q, [1, 5, 2, 0, 4, 3]), [BM * BK // 8])


@triton.jit
def columns_of_fragments(p, BM: tl.constexpr, BK: tl.constexpr):
    """Pairs of `rows_of_fragments`' words -> row-major."""
    return tl.reshape(tl.permute(tl.reshape(p, [BM, BK // 32, 4, 4]), [0, 1, 3, 2]), [BM * BK // 2])
