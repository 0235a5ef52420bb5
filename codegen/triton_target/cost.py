"""What a kernel should take on a GPU: the longer of moving its bytes and issuing its instructions, over the share of that bound which the form was timed at.

The bound is arithmetic from data sheets and counted code (`limits.yaml`; the dense product's instructions are counted the same way) and leaves out latency and
shared memory; the shares are timings of one GPU (`achieved.yaml`). Good for choosing between forms of one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ...ir.errors import LowerError
from ...ir.spec import suggest
from .layout import WORD, Structure, Values, word_room
from .pack import Source

DENSE_INSTRUCTIONS = 2.1  # a weight of a plain float16 product, the same tile and tokens
SLOT_BITS = 48  # an outlier with its place
_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU by its data sheet: `clock` in GHz, `bandwidth` in GB/s."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def issue_rate(self) -> float:
        """Thread instructions a nanosecond: four schedulers a multiprocessor, 32 threads each."""
        return self.multiprocessors * 4 * 32 * self.clock

    def nanoseconds(self, bits: float, instructions: float) -> float:
        """For one weight that takes so many bits and instructions."""
        return max(bits / 8 / self.bandwidth, instructions / self.issue_rate)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One form of a weight on a device: `speedup` over the dense float16 product."""

    structure: Structure
    bits: float
    instructions: float
    speedup: float


@cache
def device_named(name: str) -> Device:
    """The device called `name`; LowerError lists those known."""
    data: dict[str, Any] = yaml.safe_load((_HERE / "devices.yaml").read_text(encoding="utf-8"))
    if name not in data:
        raise LowerError(f"unknown device {name!r}{suggest(name, tuple(data))}; the cost model knows {', '.join(data)}")
    return Device(name=name, **data[name])


def estimates(source: Source, device: Device) -> list[Estimate]:
    """Every form that holds the weight exactly, fastest first."""
    found = [_estimate(source, structure, bits, device) for structure, bits in _forms(source).items()]
    return sorted(found, key=lambda e: -e.speedup)


def _estimate(source: Source, structure: Structure, bits: float, device: Device) -> Estimate:
    groups = source.scale.shape[1] if source.scale is not None else 0
    apart = len(source.outliers.row) / source.values.numel() if source.outliers is not None else 0.0
    grid = 0 if source.scale is None else (4 if source.scale.element_size() == 2 else 8) * 8 * groups / source.values.shape[1]
    instructions = _instructions(structure, source.kind, device.architecture, grouped=groups > 1) + apart * _slot(device.architecture)
    bits += grid + apart * SLOT_BITS
    dense = device.nanoseconds(16, DENSE_INSTRUCTIONS)
    speedup = _achieved(structure, source.kind) * dense / device.nanoseconds(bits, instructions)
    return Estimate(structure=structure, bits=bits, instructions=instructions, speedup=speedup)


def _forms(source: Source) -> dict[Structure, float]:
    """Structures that hold the weight, with the bits of presence and values for each weight."""
    bits, present = source.kind.bits, source.present
    if present is None:
        return {Structure.DENSE: bits}
    forms = {} if source.kind is Values.HALF or source.table is not None else {Structure.DENSE: float(bits)}
    most = _most(present, WORD)
    if most <= WORD // 2:
        forms[Structure.BALANCED] = 1 + bits * word_room(most, bits) / WORD
    if _most(present, 4) <= 2 and source.table is None:
        forms[Structure.TWO_OF_FOUR] = 1 + bits / 2
    if source.kind is not Values.ROWS:
        forms[Structure.BITMAP] = 1.5 + bits * float(present.float().mean())
    return forms


def _most(present: Tensor, width: int) -> int:
    whole = present[:, : present.shape[1] // width * width]
    return max(1, int(whole.unflatten(1, (-1, width)).sum(-1).max())) if whole.numel() else width


@cache
def _table() -> dict[str, dict[int, list[float]]]:
    limits: dict[str, dict[int, list[float]]] = yaml.safe_load((_HERE / "limits.yaml").read_text(encoding="utf-8"))["limits"]
    return limits


@cache
def _achieved(structure: Structure, kind: Values) -> float:
    """Share of the bound; of 4-bit codes where the kind itself was not timed."""
    shares: dict[str, float] = yaml.safe_load((_HERE / "achieved.yaml").read_text(encoding="utf-8"))[structure.value]
    return shares.get(kind.value, shares["code4"])


def _slot(architecture: int) -> float:
    return _table()["4-bit shared table, outliers"][architecture][3]


def _instructions(structure: Structure, kind: Values, architecture: int, *, grouped: bool) -> float:
    """Of the counted variant that is nearest."""
    half, grouping = kind is Values.HALF, ", groups of 128" if grouped else ""
    name = {
        Structure.BITMAP: "bitmap 50 %, float16" if half else f"bitmap 50 %, 4-bit codes{grouping}",
        Structure.BALANCED: "balanced 16:32, float16" if half else "balanced 16:32, row tables" if kind is Values.ROWS else "balanced 16:32, 4-bit codes",
        Structure.TWO_OF_FOUR: "2:4, float16" if half else "2:4, 4-bit codes",
        Structure.DENSE: {
            Values.SHARED: "4-bit shared table", Values.ROWS: "4-bit row tables", Values.CODE8: "8-bit codes"
        }.get(kind, "4-bit codes, groups of 128"),
    }[structure]  # fmt: skip
    return _table()[name][architecture][0]
