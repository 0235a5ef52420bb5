"""What sparse formats share: which weights are present, and a dense format for their values.

A sparse format wraps an inner format (`dense`, `affine` or `lut`). Of the one tensor that the inner format has for every weight (`values`, or packed `codes`)
only the present entries are stored, row by row; its other tensors (scales, zero points, tables) stay as they are. Absent weights are exactly 0. So pruning
and quantization stack without loss: quantize a pruned weight, then drop the codes of its zeros.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import FormatError
from .affine import Affine
from .base import Payload, TensorSpec, WeightFormat, parse_format
from .bitpack import pack, packed_width, unpack
from .dense import Dense
from .lut import Lut

INNER = (Dense, Affine, Lut)


@dataclass(frozen=True, kw_only=True)
class Sparse(WeightFormat):
    """Base of the sparse formats. `values` is the spec of the inner format (written in its shortest form)."""

    values: str = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = parse_format(self.values)
        if not isinstance(inner, INNER):
            raise FormatError(f"{self.name}: values={self.values!r}: expected dense, affine{{...}} or lut{{...}}, got {inner.name}")
        object.__setattr__(self, "values", inner.to_spec())

    @property
    def inner(self) -> WeightFormat:
        """The format of the values."""
        return parse_format(self.values)

    @property
    def key(self) -> str:
        """The inner tensor that has an entry for every weight."""
        return "values" if isinstance(self.inner, Dense) else "codes"

    @property
    def code_bits(self) -> int | None:
        """Bits of a stored code; None when values are floats."""
        return getattr(self.inner, "bits", None)

    @abstractmethod
    def kept_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the kept entries: `(count,)`, or `(N, kept in a row)`."""

    def presence_spec(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """What says which weights are present: `mask: [N, ceil(K/8)] uint8`, bit j of byte i for column 8i + j, unless a format has something smaller."""
        return {"mask": TensorSpec((rows, packed_width(columns, 1)), torch.uint8)}

    def pack_presence(self, present: Tensor) -> dict[str, Tensor]:
        """`present: [N, K] bool` as stored; as many as the format demands."""
        return {"mask": pack(present.to(torch.uint8), 1)}

    def unpack_presence(self, payload: Payload, rows: int, columns: int) -> Tensor:
        """`[N, K] bool`."""
        return unpack(payload["mask"], 1, columns).bool()

    @abstractmethod
    def choose(self, matrix: Tensor) -> Tensor:
        """`[N, K] bool`: the weights of `matrix: [N, K]` to keep, largest magnitudes first, of equal ones the lower column first."""

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """What the inner format refuses."""
        return self.inner.why_illegal(rows, columns)

    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Presence, then the inner tensors for a weight `[N, K]`, with only the kept entries of the per-weight one."""
        spec = self.inner.payload_spec(rows, columns, dtype)
        *lead, last = self.kept_shape(rows, columns)
        width = last if self.code_bits is None else packed_width(last, self.code_bits)
        return self.presence_spec(rows, columns) | spec | {self.key: TensorSpec((*lead, width), spec[self.key].dtype)}

    def pack(self, present: Tensor, inner: Payload) -> dict[str, Tensor]:
        """Payload of the weights where `present: [N, K] bool`, from the inner payload of the whole weight."""
        rows, columns = present.shape
        if int(present.sum()) != prod(self.kept_shape(rows, columns)):
            raise FormatError(
                f"{self.to_spec()}: the mask [{rows}, {columns}] keeps {int(present.sum())} weights, expected {prod(self.kept_shape(rows, columns))}"
            )
        entries = inner[self.key] if self.code_bits is None else unpack(inner[self.key], self.code_bits, columns)
        kept = entries[present].reshape(self.kept_shape(rows, columns))
        return self.pack_presence(present) | dict(inner) | {self.key: kept if self.code_bits is None else pack(kept, self.code_bits)}

    def unpack(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Presence `[N, K] bool`, and the inner payload of the whole weight, whose absent entries mean 0 wherever the inner format can say so."""
        present = self.unpack_presence(payload, rows, columns)
        inner = {name: payload[name] for name in self.inner.payload_spec(rows, columns, dtype)}
        if self.code_bits is None:
            empty = torch.zeros((rows, columns), dtype=inner[self.key].dtype, device=present.device)
            return present, inner | {self.key: empty.masked_scatter(present, inner[self.key].flatten())}
        kept = unpack(inner[self.key], self.code_bits, self.kept_shape(rows, columns)[-1]).flatten()
        codes = self._zero_codes(inner, rows, columns).masked_scatter(present, kept)
        return present, inner | {self.key: pack(codes, self.code_bits)}

    def _zero_codes(self, inner: Payload, rows: int, columns: int) -> Tensor:
        """Codes `[N, K] uint8` of what is nearest to 0."""
        fmt, device = self.inner, inner[self.key].device
        if isinstance(fmt, Lut):
            nearest = fmt.values(inner, rows, columns).abs().argmin(1, keepdim=True)
            return nearest.to(torch.uint8).expand(rows, columns)
        assert isinstance(fmt, Affine)
        blank = dict(inner) | {"codes": torch.zeros((rows, packed_width(columns, fmt.bits)), dtype=torch.uint8, device=device)}
        _, scale, zero = fmt.unpack(blank, rows, columns)
        return fmt.quantize(torch.zeros((rows, columns), device=device), scale, zero)

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Keep what `choose` says; the inner format rounds it. `matrix: [N, K] float`."""
        present = self.choose(matrix)
        return self.pack(present, self.inner.encode(matrix.masked_fill(~present, 0.0)))

    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The inner weight where present, 0 elsewhere."""
        present, inner = self.unpack(payload, rows, columns, dtype)
        return self.inner.decode(inner, rows, columns, dtype).masked_fill(~present, 0.0)


def largest(magnitude: Tensor, count: int) -> Tensor:
    """`[N, K] bool`, true for the `count` largest of `magnitude: [N, K]`; of equal ones the first in row-major order."""
    if count == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    threshold = magnitude.flatten().topk(count, sorted=False).values.amin()
    above, equal = magnitude > threshold, magnitude == threshold
    missing = count - above.sum()
    return above | (equal & (equal.flatten().cumsum(0, dtype=torch.int32).reshape(equal.shape) <= missing))


def largest_of_groups(magnitude: Tensor, keep: int, group: int) -> Tensor:
    """`[N, K] bool`, true for the `keep` largest of every `group` columns; of equal ones the lower column. A short last group keeps min(keep, its width)."""
    missing = -magnitude.shape[1] % group
    padded = torch.nn.functional.pad(magnitude, (0, missing), value=-1.0).unflatten(1, (-1, group))
    order = padded.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, order, True).flatten(1)[:, : magnitude.shape[1]]
