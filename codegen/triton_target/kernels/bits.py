"""Bit-level building blocks of the kernels: 32-bit words that hold pairs of 16-bit floats, byte lanes, byte permutes.

Legend: `p` holds pairs (low half first); `y` holds four byte lanes. `NATIVE` picks one machine instruction; without it the same meaning is spelled out
in plain operators, which the interpreter runs (it knows neither inline assembly nor bfloat16 arithmetic).
"""

import triton
import triton.language as tl


@triton.jit
def join4(a, b, c, d):
    """`[...]` each -> `[..., 2, 2]`, which flattens to the order a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def sign_mask(low, high, LANE: tl.constexpr, NATIVE: tl.constexpr):
    """0xFFFF in the low (high) half where the top bit of byte `LANE` of `low` (`high`) is set, else 0."""
    if NATIVE:
        if LANE == 0:
            return _permute(low, high, "0xCC88")
        elif LANE == 1:
            return _permute(low, high, "0xDD99")
        elif LANE == 2:
            return _permute(low, high, "0xEEAA")
        else:
            return _permute(low, high, "0xFFBB")
    else:
        return (((low << (24 - 8 * LANE)) >> 31) & 0xFFFF) | (((high << (24 - 8 * LANE)) >> 31) << 16)


@triton.jit
def _permute(a, b, SELECTOR: tl.constexpr):
    ASM: tl.constexpr = "prmt.b32 $0, $1, $2, " + SELECTOR + ";"
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pick_bytes(a, b, selector, NATIVE: tl.constexpr):
    """Byte `i` of the result is byte `s` of `a` (s from 0 to 3) or `s - 4` of `b` (4 to 7), where `s` is nibble `i` of the low half of `selector`."""
    if NATIVE:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1)
    else:
        out = tl.zeros_like(selector)
        for i in tl.static_range(4):
            s = (selector >> (4 * i)) & 7
            shift = 8 * (s & 3)
            out |= (tl.where(s < 4, a >> shift, b >> shift) & 255) << (8 * i)
        return out


@triton.jit
def population(x, NATIVE: tl.constexpr):
    """Bits set in every word."""
    if NATIVE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF


@triton.jit
def subtract_pairs(p, q, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """Halfwise `p - q` in the compute dtype."""
    if NATIVE:
        if BF16:
            ASM: tl.constexpr = "{ .reg .b32 m; mov.b32 m, 0xBF80BF80; fma.rn.bf16x2 $0, $2, m, $1; }"
            return tl.inline_asm_elementwise(ASM, "=r,r,r", [p, q], dtype=tl.int32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [p, q], dtype=tl.int32, is_pure=True, pack=1)
    else:
        low = bits16(floats(p & 0xFFFF, BF16) - floats(q & 0xFFFF, BF16), BF16)
        return low | (bits16(floats((p >> 16) & 0xFFFF, BF16) - floats((q >> 16) & 0xFFFF, BF16), BF16) << 16)


@triton.jit
def floats(half, BF16: tl.constexpr):
    """float32 of 16-bit floats in the low halves of `half`."""
    if BF16:
        return (half << 16).to(tl.float32, bitcast=True)
    else:
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def bits16(value, BF16: tl.constexpr):
    """16-bit floats, in the low halves, of float32 values that they hold exactly."""
    if BF16:
        return (value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    else:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def tile_of(p, BM: tl.constexpr, BK: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):
    """Pairs `[BM * BK / 2]` in any shape, row-major -> the tile `[BM, BK]` (float32 for bfloat16 without `NATIVE`)."""
    if BF16 and not NATIVE:
        return tl.reshape(tl.join(floats(p & 0xFFFF, True), floats((p >> 16) & 0xFFFF, True)), [BM, BK])
    else:
        DTYPE: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
        low, high = p.to(tl.int16).to(DTYPE, bitcast=True), (p >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.reshape(tl.join(low, high), [BM, BK])
