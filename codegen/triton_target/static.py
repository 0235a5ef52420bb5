"""The static gate: what every kernel variant costs in machine instructions on sm_80 and sm_90, against the limits of `limits.yaml`.

An H100 issues about 9 thread instructions for every byte that it fetches, an A100 10: a format that decodes in more instructions a weight than its bytes allow
cannot reach the bandwidth, whatever its size. The numbers depend on the compiler, so the gate holds for one release of triton, which `limits.yaml` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
import yaml
from torch import Tensor

from ...ir.errors import LowerError
from .layout import Packed, Structure, Tile, Values
from .pack import Source, pack
from .sass import LoopCost, loop_cost
from .slots import Outliers

ARCHITECTURES = (80, 90)
LIMITS = Path(__file__).with_name("limits.yaml")
_SHAPE = (64, 512)  # two tiles or more of any size; contents do not matter to the code
_FIELDS = ("instructions", "shared", "registers", "slot")


@dataclass(frozen=True, kw_only=True)
class StaticRow:
    """One variant on one architecture: what it costs, and what it may."""

    variant: str
    architecture: int
    cost: LoopCost
    limits: dict[str, float]

    @property
    def faults(self) -> tuple[str, ...]:
        """Limits that it breaks. Spills and the lack of asynchronous copies are never allowed."""
        cost = asdict(self.cost)
        found = [f"{name} {cost[name]:.4g} > {limit:g}" for name, limit in self.limits.items() if cost[name] > limit]
        return (*found, *(["spills registers"] if cost["spilled"] else []), *([] if cost["copies"] else ["has no asynchronous copies"]))


def _present(keep: int, group: int) -> Tensor:
    return (torch.arange(_SHAPE[1]) % group < keep).expand(_SHAPE).contiguous()


def _source(kind: Values, present: Tensor | None = None, dtype: torch.dtype = torch.float16, group: int | None = None) -> Source:
    """Weights of the right kinds and shapes, all zero."""
    rows, columns = _SHAPE
    if kind is Values.HALF:
        return Source(kind=kind, values=torch.zeros(_SHAPE, dtype=dtype), dtype=dtype, present=present)
    scale = torch.ones(rows, columns // group if group else 1, dtype=torch.float16)
    table = {Values.SHARED: torch.zeros(1, 16, dtype=dtype), Values.ROWS: torch.zeros(rows, 16, dtype=torch.int8)}.get(kind)
    zero = torch.arange(scale.numel()).reshape(scale.shape) % 2 if table is None else None  # zero points of their own
    return Source(kind=kind, values=torch.zeros(_SHAPE, dtype=torch.uint8), dtype=dtype, present=present, scale=scale, zero=zero, table=table, group=group)


def _with_outlier() -> Packed:
    nothing = torch.zeros(1, dtype=torch.int64)
    outlier = Outliers(row=nothing, column=nothing, value=torch.zeros(1, dtype=torch.float16))
    return pack(replace(_source(Values.SHARED), outliers=outlier), Structure.DENSE, Tile())


def _packer(
    structure: Structure, kind: Values, keep: int = 16, of: int = 32, dtype: torch.dtype = torch.float16, group: int | None = None
) -> Callable[[], Packed]:
    return lambda: pack(_source(kind, None if structure is Structure.DENSE else _present(keep, of), dtype, group), structure, Tile())


VARIANTS: dict[str, Callable[[], Packed]] = {
    "bitmap 50 %, float16": _packer(Structure.BITMAP, Values.HALF),
    "bitmap 47 %, float16": _packer(Structure.BITMAP, Values.HALF, keep=15),
    "bitmap 50 %, 4-bit codes": _packer(Structure.BITMAP, Values.CODE4),
    "bitmap 50 %, 4-bit codes, groups of 128": _packer(Structure.BITMAP, Values.CODE4, group=128),
    "balanced 16:32, float16": _packer(Structure.BALANCED, Values.HALF),
    "balanced 16:32, bfloat16": _packer(Structure.BALANCED, Values.HALF, dtype=torch.bfloat16),
    "balanced 8:32, float16": _packer(Structure.BALANCED, Values.HALF, keep=8),
    "balanced 16:32, 4-bit codes": _packer(Structure.BALANCED, Values.CODE4),
    "balanced 16:32, row tables": _packer(Structure.BALANCED, Values.ROWS),
    "2:4, float16": _packer(Structure.TWO_OF_FOUR, Values.HALF, keep=2, of=4),
    "2:4, 4-bit codes": _packer(Structure.TWO_OF_FOUR, Values.CODE4, keep=2, of=4),
    "4-bit codes, groups of 128": _packer(Structure.DENSE, Values.CODE4, group=128),
    "8-bit codes": _packer(Structure.DENSE, Values.CODE8),
    "8-bit codes, bfloat16": _packer(Structure.DENSE, Values.CODE8, dtype=torch.bfloat16),
    "4-bit shared table": _packer(Structure.DENSE, Values.SHARED),
    "4-bit shared table, outliers": _with_outlier,
    "4-bit row tables": _packer(Structure.DENSE, Values.ROWS),
    "4-bit row tables, bfloat16": _packer(Structure.DENSE, Values.ROWS, dtype=torch.bfloat16),
}


def static_table(names: tuple[str, ...] = tuple(VARIANTS), architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[StaticRow]:
    """Measure the variants one by one. LowerError when the limits were made with another release of triton."""
    data = yaml.safe_load(LIMITS.read_text(encoding="utf-8"))
    if triton.__version__ != data["triton"]:
        raise LowerError(f"the static gate was made with triton {data['triton']} and this is {triton.__version__}; install triton=={data['triton']} to compare")
    for name in names:
        packed = VARIANTS[name]()
        for architecture in architectures:
            limits = dict(zip(_FIELDS, data["limits"][name][architecture], strict=False))  # slots only where there are outliers
            yield StaticRow(variant=name, architecture=architecture, cost=loop_cost(packed, architecture), limits=limits)
