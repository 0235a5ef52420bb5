"""Run the kernels on a `Packed` weight: grids, splits along K, compile-time facts."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .kernels.matmul import lscd_decode, lscd_matmul
from .kernels.reduce import reduce_splits
from .layout import TILED, Packed, Structure
from .schedule import Schedule, hopper
from .slots import CHUNK, add_slots

_LATE = (Structure.BITMAP, Structure.BALANCED)  # rebuilt pair by pair in the lanes that multiply them
NATIVE = os.environ.get("TRITON_INTERPRET", "0") != "1"  # the interpreter knows no inline assembly


def variant(packed: Packed, wgmma: bool) -> dict[str, Any]:
    """Compile-time arguments that both kernels share. `wgmma`: the matrix instruction is Hopper's, whose left side the compiler lays out from registers."""
    bits = packed.values_kind.bits
    element = 8 * packed.values.element_size() // bits  # values that an element of `values` holds
    return {
        "BM": packed.tile.rows, "BK": packed.tile.columns, "PAIRS": packed.pairs, "COUNT": 2 * packed.pairs // element, "STRUCTURE": packed.structure.value,
        "VALUES": packed.values_kind.value if packed.entries else bits, "ENTRIES": packed.entries, "PER_GROUP": packed.group,
        "SCALED": packed.grid.numel() > 0, "WIDE": packed.grid.shape[-1] == 2, "SHIFTED": packed.zeroed, "CONSTANT": packed.shift,
        "REGISTERS": packed.structure in _LATE or (wgmma and packed.structure is Structure.DENSE), "WGMMA": wgmma,
        "BF16": packed.dtype is torch.bfloat16, "NATIVE": NATIVE,
    }  # fmt: skip


def matmul(packed: Packed, x: Tensor, bias: Tensor | None, schedule: Schedule) -> Tensor:
    """`x: [N, K] -> [N, M]` in x's dtype, sums in float32. Splits add up in a fixed order: the result does not change from run to run."""
    tokens, rows = x.shape[0], packed.rows
    turns = -(-packed.tiles // schedule.splits)
    splits = -(-packed.tiles // turns)
    alone = splits == 1
    bias = bias if NATIVE or bias is None else bias.float()  # the interpreter has no bfloat16
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    y = (out if NATIVE else out.float()) if alone else torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    grid = (-(-rows // packed.tile.rows), -(-tokens // schedule.tokens), splits)
    lscd_matmul[grid](
        *packed.tensors, x if NATIVE or x.dtype is not torch.bfloat16 else x.view(torch.int16), x if bias is None else bias, y, rows, tokens, packed.columns,
        packed.tiles, packed.groups, turns, BN=schedule.tokens, GROUPED=packed.groups > 1, BIASED=bias is not None and alone,
        EVEN=packed.columns % packed.tile.columns == 0, SLOTS=CHUNK if packed.slots.numel() else 0, STAGES=schedule.stages, num_warps=schedule.warps,
        num_stages=schedule.stages, **variant(packed, hopper(packed.values.device)),
    )  # fmt: skip
    if alone:
        return y.to(x.dtype)
    total = out if NATIVE else out.float()
    reduce_splits[(-(-rows // 256), tokens)](y, y if bias is None else bias, total, tokens, rows, splits, BIASED=bias is not None, BLOCK=256)
    return total.to(x.dtype)


def decode(packed: Packed) -> Tensor:
    """The dense weight `[M, K]` in its dtype."""
    out = torch.empty((packed.rows, packed.columns), dtype=packed.dtype if NATIVE else torch.float32, device=packed.values.device)
    grid = (-(-packed.rows // packed.tile.rows), packed.tiles)
    lscd_decode[grid](
        *(getattr(packed, name) for name in TILED),
        out,
        packed.rows,
        packed.columns,
        packed.tiles,
        packed.groups,
        **variant(packed, hopper(packed.values.device)),
    )
    dense = out.to(packed.dtype)
    if packed.slots.numel():
        add_slots(dense, packed.slots, packed.slot_values, packed.slot_starts, packed.tile.rows)
    return dense
