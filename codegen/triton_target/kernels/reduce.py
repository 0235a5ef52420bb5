"""Add up what the splits of a product left, in order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "splits"])
def reduce_splits(partial, bias, y, N, M, splits, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """`partial: [splits, N, M] float32 -> y: [N, M]`, the bias `[M]` added; split by split, so the same every time."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * N + token) * M + rows, mask=rows < M, other=0.0)
    if BIASED:
        total += tl.load(bias + rows, mask=rows < M, other=0.0).to(tl.float32)
    tl.store(y + token * M + rows, total.to(y.dtype.element_ty), mask=rows < M)
