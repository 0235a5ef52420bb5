"""Plain weights, optionally stored in a narrower float type."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .base import Payload, TensorSpec, WeightFormat, rows_and_width


class FloatType(Enum):
    """Storage type of a dense weight."""

    SAME = "same"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Dense(WeightFormat):
    """`weight: [N, K]` stored as it is (`same`) or cast to `storage` and back on decode."""

    storage: FloatType = FloatType.SAME

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.storage is FloatType.SAME else getattr(torch, self.storage.value)

    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """One tensor `values: [N, K]`."""
        return {"values": TensorSpec((rows, columns), self._stored(dtype))}

    @property
    def takes_prefixes(self) -> bool:
        """As plain weights."""
        return True

    def take(self, payload: Payload, rows: int, columns: int, kept: Tensor, width: int) -> dict[str, Tensor]:
        """A part of the matrix."""
        return {"values": rows_and_width(payload["values"], kept, width)}

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Cast `matrix: [N, K]` to the storage type."""
        return {"values": matrix.detach().to(self._stored(matrix.dtype)).contiguous()}

    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Cast back to `dtype`."""
        return payload["values"].to(dtype)
