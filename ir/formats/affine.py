"""Uniform (affine) quantization: `weight = (code - zero_point) * scale`, 1 to 8 bits, packed.

Symmetric codes use the fixed zero point `2^(bits-1)` (one bit: the two levels are -scale/2 and +scale/2, zero point 0.5). Asymmetric codes
store an integer zero point in `[0, 2^bits)` per group, so a weight of exactly 0 is always representable when its range holds 0,
which `min_max` ensures: zeros left by pruning stay exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..errors import FormatError
from ..rounding import round_up
from ..spec import option
from .base import Payload, TensorSpec, WeightFormat, rows_and_width
from .bitpack import pack, packed_width, unpack


class Granularity(Enum):
    """What shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


class ScaleType(Enum):
    """Storage type of the scales."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@dataclass(frozen=True, kw_only=True)
class Affine(WeightFormat):
    """Packed integer codes with scales; groups run along K, the last one may be short."""

    bits: int = option(ge=1, le=8)
    group_size: int | None = option(None, ge=1)
    symmetric: bool = False
    granularity: Granularity | None = None
    scale_dtype: ScaleType = ScaleType.FLOAT16

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sharing is Granularity.GROUP) != (self.group_size is not None):
            raise FormatError(f"affine: group_size={self.group_size} does not go with granularity={self.sharing.value}; give group_size only for groups")

    @property
    def sharing(self) -> Granularity:
        """What shares one scale: as given, else groups when `group_size` is set, else the row."""
        return self.granularity or (Granularity.GROUP if self.group_size else Granularity.CHANNEL)

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    @property
    def fixed_zero(self) -> float:
        """Zero point of symmetric codes."""
        return 0.5 if self.bits == 1 else float(self.levels // 2)

    def group_width(self, columns: int) -> int:
        """Columns that share a scale."""
        return min(self.group_size or columns, columns)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape `[N or 1, G]` of the scales."""
        return (1 if self.sharing is Granularity.TENSOR else rows, -(-columns // self.group_width(columns)))

    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """`codes: [N, ceil(K*bits/8)] uint8`, `scale: [N, G]`, and `zero_point: [N, ceil(G*bits/8)] uint8` when asymmetric."""
        grid = self.grid(rows, columns)
        spec = {
            "codes": TensorSpec((rows, packed_width(columns, self.bits)), torch.uint8),
            "scale": TensorSpec(grid, getattr(torch, self.scale_dtype.value)),
        }
        if not self.symmetric:
            spec["zero_point"] = TensorSpec((grid[0], packed_width(grid[1], self.bits)), torch.uint8)
        return spec

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """A group wider than the row is refused: it would silently become per channel."""
        if self.group_size and self.group_size > columns:
            return f"group_size={self.group_size} is wider than the {columns} columns; use group_size <= {columns} or none (per channel)"
        return None

    @property
    def takes_prefixes(self) -> bool:
        """Codes of a row are one stream."""
        return True

    def take(self, payload: Payload, rows: int, columns: int, kept: Tensor, width: int) -> dict[str, Tensor]:
        """Prefixes of the streams of codes; a group is never cut in two."""
        if self.group_size and width < columns and width % self.group_size:
            raise FormatError(
                f"{self.to_spec()} of [{rows}, {columns}]: {width} columns end inside a group of {self.group_size}; use widths that are multiples of "
                f"{self.group_size} (multiple_of={self.group_size}), or a smaller group_size"
            )
        every = torch.zeros(1, dtype=torch.int64)
        spec = self.payload_spec(len(kept), width, torch.float32)
        shared = self.sharing is Granularity.TENSOR
        return {n: rows_and_width(t, every if shared and n != "codes" else kept, spec[n].shape[1]) for n, t in payload.items()}

    def group(self, matrix: Tensor, fill: float = 0.0) -> Tensor:
        """`[N, K] -> [N, G, g]` (per tensor: `[1, 1, N*K]`), a short last group padded with `fill`."""
        if self.sharing is Granularity.TENSOR:
            return matrix.reshape(1, 1, -1)
        width = self.group_width(matrix.shape[1])
        missing = -matrix.shape[1] % width
        padded = torch.nn.functional.pad(matrix, (0, missing), value=fill) if missing else matrix
        return padded.reshape(matrix.shape[0], -1, width)

    def ungroup(self, groups: Tensor, rows: int, columns: int) -> Tensor:
        """Inverse of `group`."""
        if self.sharing is Granularity.TENSOR:
            return groups.reshape(rows, columns)
        return groups.reshape(rows, -1)[:, :columns]

    def span(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each group, `[N, G]`: zero included, mirrored when symmetric (1 bit: the mean magnitude, whose two levels err least)."""
        groups = self.group(matrix)
        if not self.symmetric:
            return groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        high = groups.abs().amax(-1) if self.bits > 1 else groups.abs().sum(-1) / self._counts(matrix)
        return -high, high

    def _counts(self, matrix: Tensor) -> Tensor:
        """Weights in each group, `[G]` (the last may be short)."""
        return self.group(torch.ones_like(matrix[:1])).sum(-1).squeeze(0) if self.sharing is not Granularity.TENSOR else torch.tensor(float(matrix.numel()))

    def grid_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (as it will be stored) and zero point of codes that span `[low, high]`, all `[N, G]`."""
        scale = self.round_scale((high - low) / (self.levels - 1))
        if self.symmetric:
            return scale, torch.full_like(scale, self.fixed_zero)
        return scale, (-low / scale).round_().clamp_(0, self.levels - 1)

    def min_max(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both `[N, G] float`, that span each group."""
        return self.grid_of(*self.span(matrix))

    def round_scale(self, scale: Tensor) -> Tensor:
        """`scale` as it will be stored: rounded up to the storage type, so that it still spans its group; never zero or infinite."""
        return round_up(scale, getattr(torch, self.scale_dtype.value))

    def quantize(self, matrix: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes `[N, K] uint8` of `matrix: [N, K]` on the grids `scale, zero: [N, G]`."""
        groups = self.group(matrix)
        codes = (groups / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(0, self.levels - 1)
        return self.ungroup(codes, *matrix.shape).to(torch.uint8)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """`(code - zero) * scale` of codes `[N, K]`, in the dtype of `scale`."""
        groups = self.group(codes).to(scale.dtype)
        return self.ungroup((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1), *codes.shape)

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """Payload of codes `[N, K]` with `scale, zero: [N, G]`."""
        payload = {"codes": pack(codes, self.bits), "scale": scale.to(getattr(torch, self.scale_dtype.value)).contiguous()}
        if not self.symmetric:
            payload["zero_point"] = pack(zero.to(torch.uint8), self.bits)
        return payload

    def unpack(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[N, K] uint8`, scale and zero point `[N, G] dtype`."""
        scale = payload["scale"].to(dtype)
        codes = unpack(payload["codes"], self.bits, columns)
        if self.symmetric:
            return codes, scale, torch.full_like(scale, self.fixed_zero)
        return codes, scale, unpack(payload["zero_point"], self.bits, self.grid(rows, columns)[1]).to(dtype)

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Round to nearest on min-max ranges; `matrix: [N, K] float`, finite."""
        scale, zero = self.min_max(matrix.float())
        return self.pack(self.quantize(matrix.float(), scale, zero), scale, zero)

    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """`(code - zero_point) * scale`, computed in fp32 and cast to `dtype`."""
        return self.dequantize(*self.unpack(payload, rows, columns)).to(dtype)
