"""Pack unsigned codes of 1 to 8 bits into bytes and back: a little-endian bit stream along the last axis.

Code `i` of a row occupies bits `[i*b, (i+1)*b)` of that row's stream, lowest bit first; rows end on a byte. For 1, 2, 4 and 8 bits this is
the layout of ONNX Runtime's MatMulNBits and of ONNX's sub-byte tensors. 3, 5, 6 and 7 bits are packed truly, with no unused bits but the row's last byte.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes: [..., K] integer in [0, 2^bits)` -> `[..., ceil(K*bits/8)] uint8`."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    if 8 % bits == 0:
        return _pack_aligned(codes, bits)
    padded = _pad_to_multiple(codes.to(torch.uint8), 8)
    chunks = padded.unflatten(-1, (-1, 8)).to(torch.int64)
    word = (chunks << (bits * torch.arange(8, device=codes.device))).sum(-1)
    data = ((word.unsqueeze(-1) >> (8 * torch.arange(bits, device=codes.device))) & 255).to(torch.uint8)
    return data.flatten(-2)[..., : packed_width(codes.shape[-1], bits)].contiguous()


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """`data: [..., ceil(count*bits/8)] uint8` -> codes `[..., count] uint8`."""
    if bits == 8:
        return data
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        codes = (data.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(-2)[..., :count]
    padded = _pad_to_multiple(data, bits)
    chunks = padded.unflatten(-1, (-1, bits)).to(torch.int64)
    word = (chunks << (8 * torch.arange(bits, device=data.device))).sum(-1)
    codes = (word.unsqueeze(-1) >> (bits * torch.arange(8, device=data.device))) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _pack_aligned(codes: Tensor, bits: int) -> Tensor:
    """Codes that never straddle bytes (1, 2 and 4 bits), joined without a wide intermediate."""
    lanes = _pad_to_multiple(codes.to(torch.uint8), 8 // bits).unflatten(-1, (-1, 8 // bits))
    out = lanes[..., 0].clone()
    for i in range(1, 8 // bits):
        out |= lanes[..., i] << (i * bits)
    return out


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x
