"""Load as sparse, compute as dense: `y = x W^T` where W travels compressed and its tiles are rebuilt on chip for the tensor cores.

One template for every structure and every kind of value. Legend: W is `[M, K]`, x `[N, K]`, y `[N, M]`; tiles are `[BM, BK]`, stored one after another along
K, row of tiles by row of tiles. A word holds the presence bits of 32 columns; NW words a tile. The weights stand on the left (y^T = W x^T), so that the few
tokens fill the narrow side of the matrix instruction. The tile of the next turn is rebuilt while this turn's product runs. Dense tiles are stored as lanes hold
the instruction's left side (fragments.py); bitmaps and balanced words are rebuilt pair by pair in the lane that multiplies the pair. REGISTERS: what a turn
hands to the next are pairs, and the compiler carries the instruction's layout back through them; else it is the tile, which hides the rebuilding from the
compiler (before Hopper it would halve the fragments' vectors).

The idea is Flash-LLM's (Xia et al., VLDB 2023, arXiv 2309.10285); the bitmap of presence is SpInfer's (Fan et al., EuroSys 2025). Tables of overlapping pairs,
byte lanes of ranks, balanced words, and low-bit values under a bitmap are ours.
"""

import triton
import triton.language as tl

from .bits import floats, subtract_pairs, tile_of
from .expand import expand_2to4, expand_balanced, expand_bitmap, rows_of_values
from .fragments import columns_of_fragments, pairs_of_fragments, rows_of_fragments
from .outliers import add_outliers
from .values import code_pairs, halves, row_pairs, shared_pairs


@triton.jit
def load_words(words, t, NW: tl.constexpr, STRUCTURE: tl.constexpr):
    """Presence bits (2:4: places) of tile `t`, `[NW] int32`; dense tiles have none."""
    if STRUCTURE == "dense":
        return 0
    else:
        return tl.load(words + t * NW + tl.arange(0, NW))


@triton.jit
def load_starts(starts, t, NW: tl.constexpr, STRUCTURE: tl.constexpr):
    """Where each word's values begin in tile `t` of a bitmap, `[NW] int16`."""
    if STRUCTURE == "bitmap":
        return tl.load(starts + t * NW + tl.arange(0, NW))
    else:
        return 0


@triton.jit
def load_values(values, offsets, t, COUNT: tl.constexpr, STRUCTURE: tl.constexpr):
    """The stored values of tile `t`: COUNT elements, or for a bitmap those between its offsets (in units of 16 bytes)."""
    at = tl.arange(0, COUNT)
    if STRUCTURE == "bitmap":
        UNIT: tl.constexpr = 128 // values.dtype.element_ty.primitive_bitwidth
        first = tl.load(offsets + t)
        return tl.load(values + first * UNIT + at, mask=at < (tl.load(offsets + t + 1) - first) * UNIT, other=0)
    else:
        return tl.load(values + t * COUNT + at)


@triton.jit
def rebuild(w, s, q, table, t0, t1, t2, t3, offset, BM: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr, STRUCTURE: tl.constexpr,
            VALUES: tl.constexpr, ENTRIES: tl.constexpr, SHIFTED: tl.constexpr, REGISTERS: tl.constexpr,
            WGMMA: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """The tile `[BM, BK]` from its stored parts; PAIRS pairs of stored values in COUNT elements; `offset: [BM]` pairs are subtracted when SHIFTED."""
    NW: tl.constexpr = BM * BK // 32
    if STRUCTURE == "balanced":
        LANE: tl.constexpr = 4 if NW >= 512 else 2 if NW >= 256 else 1
        q = rows_of_values(q, BM, BK // 32, LANE, COUNT, 128 // q.dtype.primitive_bitwidth)
    if STRUCTURE == "dense" and VALUES == "rows":
        q = rows_of_fragments(q, BM, BK)
    if VALUES == "shared":
        p = shared_pairs(q, t0, t1, t2, t3, PAIRS, ENTRIES, NATIVE)
    elif VALUES == "rows":
        p = row_pairs(q, t0, t1, t2, t3, BM, PAIRS // BM // 4, ENTRIES, BF16, NATIVE)
    else:
        p = code_pairs(q, PAIRS, VALUES, BF16)
    if STRUCTURE == "dense":
        p = columns_of_fragments(p, BM, BK) if VALUES == "rows" else pairs_of_fragments(p, BM, BK, 32 if VALUES == 8 or VALUES == 16 else 64)
    spread = tl.reshape(tl.broadcast_to(offset[:, None], [BM, BK // 32]), [NW]) if SHIFTED else 0
    if SHIFTED and (STRUCTURE == "dense" or STRUCTURE == "2:4"):
        p = tl.reshape(subtract_pairs(tl.reshape(p, [BM, PAIRS // BM]), offset[:, None], BF16, NATIVE), [PAIRS])
    if STRUCTURE == "2:4":
        p = expand_2to4(w, p, table, NW, NATIVE)
    elif STRUCTURE == "balanced":
        p = expand_balanced(w, p, spread, BM, BK // 32, PAIRS * 2 // NW, SHIFTED, WGMMA, BF16, NATIVE)
    elif STRUCTURE == "bitmap":
        v = q if VALUES == 16 else halves(p, PAIRS)
        p = expand_bitmap(w, s.to(tl.int32) & 0xFFFF, v, spread, NW, SHIFTED, WGMMA, BF16, NATIVE)
    if REGISTERS:
        return p
    else:
        return tile_of(p, BM, BK, BF16, NATIVE)


@triton.jit
def finished(a, BM: tl.constexpr, BK: tl.constexpr, REGISTERS: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """The tile `[BM, BK]` from what `rebuild` left: pairs, where the compiler can lay them out as the matrix instruction reads them, without shared memory."""
    if REGISTERS:
        return tile_of(a, BM, BK, BF16, NATIVE)
    else:
        return a


@triton.jit
def load_grid(grid, rows, M, tile, COUNT, PER_GROUP: tl.constexpr, WIDE: tl.constexpr, USED: tl.constexpr):
    """Scale and offset of each row in the group of K-tile `tile`, a group being PER_GROUP tiles wide: words `[BM] int32` from `grid: [M, COUNT, 1 or 2]`.

    One word holds a float16 scale and, in its high half, the offset; WIDE ones are a float32 scale and the offset in a second word.
    """
    if not USED:
        return 0, 0
    elif WIDE:
        at = grid + 2 * (rows * COUNT + tile // PER_GROUP)
        return tl.load(at, mask=rows < M, other=0), tl.load(at + 1, mask=rows < M, other=0)
    else:
        word = tl.load(grid + rows * COUNT + tile // PER_GROUP, mask=rows < M, other=0)
        return word, word >> 16


@triton.jit
def scale_of(word, WIDE: tl.constexpr):
    """The float32 scale in the first word."""
    if WIDE:
        return word.to(tl.float32, bitcast=True)
    else:
        return floats(word, False)


@triton.jit
def shift_of(half, BM: tl.constexpr, SHIFTED: tl.constexpr, CONSTANT: tl.constexpr):
    """What is subtracted from codes, as pairs `[BM] int32`: the CONSTANT pair, or the offset in the low half of `half`, twice."""
    if CONSTANT:
        return tl.full([BM], CONSTANT, tl.int32)
    elif SHIFTED:
        return (half & 0xFFFF) | (half << 16)
    else:
        return 0


@triton.jit
def load_tables(codebook, rows, M, STRUCTURE: tl.constexpr, VALUES: tl.constexpr):
    """What stays on chip: byte selectors, and the four words of each row's table or of the matrix's; 0 for what there is not."""
    table, t0, t1, t2, t3 = 0, 0, 0, 0, 0
    if STRUCTURE == "2:4":
        table = tl.load(codebook + tl.arange(0, 16))
    if VALUES == "shared":
        t0, t1, t2, t3 = tl.load(codebook), tl.load(codebook + 1), tl.load(codebook + 2), tl.load(codebook + 3)
    if VALUES == "rows":
        at = codebook + rows * 4
        t0, t1 = tl.load(at, mask=rows < M, other=0), tl.load(at + 1, mask=rows < M, other=0)
        t2, t3 = tl.load(at + 2, mask=rows < M, other=0), tl.load(at + 3, mask=rows < M, other=0)
    return table, t0, t1, t2, t3


@triton.jit(do_not_specialize=["N", "tiles", "groups", "turns"])  # else every batch size and depth is compiled anew
def lscd_matmul(
    words, starts, offsets, values, codebook, grid, slots, slot_values, slot_starts, x, bias, y, M, N, K, tiles, groups, turns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr, STRUCTURE: tl.constexpr, VALUES: tl.constexpr,
    ENTRIES: tl.constexpr, GROUPED: tl.constexpr, PER_GROUP: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr, SHIFTED: tl.constexpr,
    CONSTANT: tl.constexpr, REGISTERS: tl.constexpr, WGMMA: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr, SLOTS: tl.constexpr,
    BF16: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows times `BN` tokens over `turns` of the `tiles` K-tiles.

    With one split (grid axis 2), y is the result `[N, M]` in its dtype, scaled and with the bias; with more, y is `[splits, N, M] float32` partial sums.
    GROUPED: scales change along K (every PER_GROUP tiles) and are applied to each tile's product, in float32; else each row has one.
    SLOTS: outliers taken at a time, 0 where there are none.
    """
    NW: tl.constexpr = BM * BK // 32
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    tokens = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    first = split * turns
    last = tl.minimum(first + turns, tiles) - 1
    origin = tl.program_id(0) * tiles
    inside = tl.arange(0, BK)
    table, t0, t1, t2, t3 = load_tables(codebook, rows, M, STRUCTURE, VALUES)
    scale, half = load_grid(grid, rows, M, first, groups, PER_GROUP, WIDE, SCALED)
    shift = shift_of(half, BM, SHIFTED, CONSTANT)
    t = origin + first
    w, s, q = load_words(words, t, NW, STRUCTURE), load_starts(starts, t, NW, STRUCTURE), load_values(values, offsets, t, COUNT, STRUCTURE)
    a = rebuild(w, s, q, table, t0, t1, t2, t3, shift, BM, BK, PAIRS, COUNT, STRUCTURE, VALUES, ENTRIES, SHIFTED, REGISTERS, WGMMA, BF16, NATIVE)
    acc = tl.zeros([BM, BN], tl.float32)
    for turn in tl.range(first, last + 1, num_stages=STAGES):
        column = turn * BK + inside
        if EVEN:
            b = tl.load(x + tokens[None, :] * K + column[:, None], mask=(tokens < N)[None, :], other=0)
        else:
            b = tl.load(x + tokens[None, :] * K + column[:, None], mask=(tokens < N)[None, :] & (column < K)[:, None], other=0)
        if BF16 and not NATIVE:
            b = (b.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        following = tl.minimum(turn + 1, last)
        t = origin + following
        w, s = load_words(words, t, NW, STRUCTURE), load_starts(starts, t, NW, STRUCTURE)
        q = load_values(values, offsets, t, COUNT, STRUCTURE)
        tile = finished(a, BM, BK, REGISTERS, BF16, NATIVE)
        if GROUPED:
            acc += tl.dot(tile, b) * scale_of(scale, WIDE)[:, None]
            scale, half = load_grid(grid, rows, M, following, groups, PER_GROUP, WIDE, True)
            shift = shift_of(half, BM, SHIFTED, CONSTANT)
        else:
            acc = tl.dot(tile, b, acc)
        a = rebuild(w, s, q, table, t0, t1, t2, t3, shift, BM, BK, PAIRS, COUNT, STRUCTURE, VALUES, ENTRIES, SHIFTED, REGISTERS, WGMMA, BF16, NATIVE)
    if SCALED and not GROUPED:
        acc *= scale_of(scale, WIDE)[:, None]
    if SLOTS:
        acc = add_outliers(acc, x, slots, slot_values, slot_starts, tokens, N, K, BM, SLOTS, BF16, NATIVE)
    if BIASED:
        acc += tl.load(bias + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    at = y + (split * N + tokens[None, :]) * M + rows[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (tokens < N)[None, :])


@triton.jit(do_not_specialize=["tiles", "groups"])
def lscd_decode(
    words, starts, offsets, values, codebook, grid, out, M, K, tiles, groups,
    BM: tl.constexpr, BK: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr, STRUCTURE: tl.constexpr, VALUES: tl.constexpr, ENTRIES: tl.constexpr,
    PER_GROUP: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr, SHIFTED: tl.constexpr, CONSTANT: tl.constexpr, REGISTERS: tl.constexpr,
    WGMMA: tl.constexpr, BF16: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """One tile of the dense weight `out: [M, K]`: for batches so large that the library's dense product wins."""
    NW: tl.constexpr = BM * BK // 32
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    turn = tl.program_id(1)
    columns = turn * BK + tl.arange(0, BK)
    table, t0, t1, t2, t3 = load_tables(codebook, rows, M, STRUCTURE, VALUES)
    scale, half = load_grid(grid, rows, M, turn, groups, PER_GROUP, WIDE, SCALED)
    shift = shift_of(half, BM, SHIFTED, CONSTANT)
    t = tl.program_id(0) * tiles + turn
    w, s, q = load_words(words, t, NW, STRUCTURE), load_starts(starts, t, NW, STRUCTURE), load_values(values, offsets, t, COUNT, STRUCTURE)
    a = rebuild(w, s, q, table, t0, t1, t2, t3, shift, BM, BK, PAIRS, COUNT, STRUCTURE, VALUES, ENTRIES, SHIFTED, REGISTERS, WGMMA, BF16, NATIVE)
    a = finished(a, BM, BK, REGISTERS, BF16, NATIVE).to(tl.float32)
    if SCALED:
        a *= scale_of(scale, WIDE)[:, None]
    tl.store(out + rows[:, None] * K + columns[None, :], a.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < K)[None, :])
