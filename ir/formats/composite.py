"""A weight as a sum of parts in other formats: few bits for all weights and, apart, the ones that these serve badly.

The dense-and-sparse split of SqueezeLLM (S. Kim et al., 2023, section 4.2) is `composite{parts=['sparse_outliers{...}','lut{...}']}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..errors import FormatError, SpecError
from .base import Payload, TensorSpec, WeightFormat, parse_format

EXAMPLE = "for example composite{parts=[dense,dense]}, where a part is any other format, such as 'affine{bits=4}' in quotes"


@dataclass(frozen=True, kw_only=True)
class Composite(WeightFormat):
    """`weight = part 0 + part 1 + ...`; every part is the spec of another format (written in its shortest form)."""

    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) < 2:
            raise SpecError(f"composite: expected at least two parts, got {len(self.parts)}; {EXAMPLE}")
        formats = [parse_format(part) for part in self.parts]
        if any(isinstance(f, Composite) for f in formats):
            raise FormatError(f"composite: a part is a composite itself, in parts={list(self.parts)}; write its parts in its place")
        object.__setattr__(self, "parts", tuple(f.to_spec() for f in formats))

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The parts' formats."""
        return tuple(parse_format(part) for part in self.parts)

    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The parts' tensors for a weight `[N, K]`, `codes` of the first being `part0_codes` and so on."""
        specs = [f.payload_spec(rows, columns, dtype) for f in self.formats]
        return {f"part{i}_{name}": spec for i, part in enumerate(specs) for name, spec in part.items()}

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """What any part cannot take."""
        reasons = ((f, f.why_illegal(rows, columns)) for f in self.formats)
        return next((f"part {f.name}: {reason}" for f, reason in reasons if reason is not None), None)

    def split(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> list[tuple[WeightFormat, dict[str, Tensor]]]:
        """Every part's format and payload."""
        names = [f.payload_spec(rows, columns, dtype) for f in self.formats]
        return [(f, {name: payload[f"part{i}_{name}"] for name in part}) for i, (f, part) in enumerate(zip(self.formats, names, strict=True))]

    def join(self, payloads: Sequence[Payload]) -> dict[str, Tensor]:
        """Inverse of `split`: one payload of the parts' payloads, in their order."""
        if len(payloads) != len(self.parts):
            raise FormatError(f"{self.to_spec()}: expected {len(self.parts)} payloads, got {len(payloads)}")
        return {f"part{i}_{name}": tensor for i, payload in enumerate(payloads) for name, tensor in payload.items()}

    @property
    def takes_prefixes(self) -> bool:
        """Where all parts do."""
        return all(f.takes_prefixes for f in self.formats)

    def take(self, payload: Payload, rows: int, columns: int, kept: Tensor, width: int) -> dict[str, Tensor]:
        """Part by part."""
        return self.join([f.take(p, rows, columns, kept, width) for f, p in self.split(payload, rows, columns, torch.float32)])

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Part by part in their order, each on what the ones before left over; `matrix: [N, K] float`."""
        (rows, columns), rest, payloads = matrix.shape, matrix.float(), []
        for fmt in self.formats:
            payloads.append(fmt.encode(rest.to(matrix.dtype)))
            rest = rest - fmt.decode(payloads[-1], rows, columns, torch.float32)
        return self.join(payloads)

    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The sum of the parts, computed in fp32 and cast to `dtype`."""
        decoded = [f.decode(p, rows, columns, torch.float32) for f, p in self.split(payload, rows, columns, dtype)]
        return reduce(torch.add, decoded).to(dtype)
