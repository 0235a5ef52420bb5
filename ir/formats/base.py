"""What every weight format is: the contract between passes and code generation.

A format views a weight as a matrix `[N, K]` (N output rows, K inputs; see `WeightSite.to_matrix`). Its frozen fields are its
parameters; `payload_spec` names the stored tensors, from which storage, saving, printing and fake tensors follow.
`decode` is pure traceable torch and **is** the meaning of the stored bits.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from ..errors import FormatError
from ..spec import Options, parse_spec, suggest

Payload = Mapping[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in memory and on disk."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class WeightFormat(Options, ABC):
    """Base of the weight formats; one file under `ir/formats/` each."""

    @abstractmethod
    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Stored tensors, in order, for a weight `[rows, columns]` that decodes to `dtype`."""

    @abstractmethod
    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Payload of `matrix: [N, K] float`, rounded as well as the format alone can (no calibration)."""

    @abstractmethod
    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The weight `[rows, columns]` in `dtype` that the payload stands for."""

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """Reason why a weight `[rows, columns]` cannot take this format, or None when it can."""
        return None

    @property
    def takes_prefixes(self) -> bool:
        """Whether `take` is there."""
        return False

    def take(self, payload: Payload, rows: int, columns: int, kept: Tensor, width: int) -> dict[str, Tensor]:
        """Payload of the rows `kept: [n] int64` and of the first `width` columns, no weight of them changed; views where the rows are the first n.

        `FormatError` where the format cannot do it at this width.
        """
        raise FormatError(f"{self.to_spec()} of [{rows}, {columns}]: no smaller part of it can be taken; slice before this format is stored")

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Bytes of the whole payload."""
        return sum(t.nbytes for t in self.payload_spec(rows, columns, dtype).values())

    def bits_per_weight(self, rows: int, columns: int, dtype: torch.dtype) -> float:
        """Stored bits per weight with scales, zero points and padding counted."""
        return 8 * self.nbytes(rows, columns, dtype) / (rows * columns)

    def check_payload(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype, where: str) -> None:
        """Refuse a payload whose tensors differ from `payload_spec` in name, shape or dtype."""
        expected = self.payload_spec(rows, columns, dtype)
        got = {k: TensorSpec(tuple(t.shape), t.dtype) for k, t in payload.items()}
        if got != expected:
            raise FormatError(f"payload of {self.to_spec()} at {where} (weight [{rows}, {columns}]): expected {expected}, got {got}")


@cache
def format_names() -> tuple[str, ...]:
    """Names of the formats: the modules of this package that define one."""
    package = importlib.import_module(__package__)
    names = (m.name for m in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(n for n in names if n not in ("base", "bitpack", "sparse")))


@cache
def format_class(name: str) -> type[WeightFormat]:
    """The format class defined in `ir/formats/<name>.py`."""
    if name not in format_names():
        raise FormatError(f"unknown weight format {name!r}{suggest(name, format_names())}; formats are {', '.join(format_names())}")
    module = importlib.import_module(f".{name}", __package__)
    return next(c for c in vars(module).values() if isinstance(c, type) and issubclass(c, WeightFormat) and c.__module__ == module.__name__)


@cache
def parse_format(spec: str) -> WeightFormat:
    """Format from its text spec, such as `affine{bits=4,group_size=64}`."""
    name, options = parse_spec(spec)
    return format_class(name).from_dict(options)


def is_prefix(indices: Tensor) -> bool:
    """Whether the indices are the first ones, in their order."""
    return torch.equal(indices, torch.arange(len(indices), device=indices.device))


def rows_and_width(tensor: Tensor, kept: Tensor, width: int) -> Tensor:
    """The rows `kept` and the first `width` entries of each; a view where the rows are the first ones."""
    return (tensor.narrow(0, 0, len(kept)) if is_prefix(kept) else tensor.index_select(0, kept.to(tensor.device))).narrow(1, 0, width)


def name_payload(fmt: WeightFormat, tensors: Sequence[Tensor], rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in `payload_spec` order as a named payload."""
    return dict(zip(fmt.payload_spec(rows, columns, dtype), tensors, strict=True))
