"""What a fast path of this target is: one weight format taken apart for the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ...ir.formats.base import Payload, WeightFormat
from ..target import Support
from .layout import Structure
from .pack import Source


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight `[rows, columns]` as it is stored; `dtype` is what it decodes to and what the product computes in."""

    format: WeightFormat
    payload: Payload
    rows: int
    columns: int
    dtype: torch.dtype


class TritonPath(ABC):
    """Base of the fast paths `codegen/triton_target/<format>.py`."""

    @abstractmethod
    def supports(self, stored: Stored) -> Support:
        """Whether the kernels can read the weight from its stored form."""

    @abstractmethod
    def source(self, stored: Stored) -> tuple[Source, Structure]:
        """The weight taken apart, every code and scale as stored, and the structure of its tiles."""
