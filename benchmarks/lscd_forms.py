"""Random weights in every form of the Triton kernels, with the dense float16 weights that they stand for: the contestants of the GPU benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxpress.codegen.triton_target.layout import Packed, Structure, Tile, Values
from fxpress.codegen.triton_target.pack import Source, pack

DENSITIES = (0.3, 0.5, 0.7, 0.9)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TILE = Tile()


def kept_of_group(rows: int, columns: int, keep: int, group: int) -> Tensor:
    """A random mask `[rows, columns] bool` with exactly `keep` of every `group` columns."""
    return (torch.rand(rows, columns // group, group, device=DEVICE).argsort(-1) < keep).flatten(1)


def weights(rows: int, columns: int, tile: Tile = TILE) -> dict[str, Callable[[], tuple[Packed, Tensor]]]:
    """Every contestant of ours: the packed weight and its dense float16 equal."""

    def build(structure: Structure, kind: Values, density: float, group: int | None = None) -> tuple[Packed, Tensor]:
        if structure is Structure.DENSE:
            present = torch.ones(rows, columns, dtype=torch.bool, device=DEVICE)
        elif structure is Structure.BITMAP:
            present = torch.rand(rows, columns, device=DEVICE) < density
        else:
            width = 4 if structure is Structure.TWO_OF_FOUR else 32
            present = kept_of_group(rows, columns, round(density * width), width)
        if kind is Values.HALF:
            values = torch.randn(rows, columns, device=DEVICE).half() / 64
            return pack(Source(kind=kind, values=values, dtype=torch.float16, present=present), structure, tile).to(DEVICE), values * present
        return _coded(kind, present, group, structure, tile)

    forms = {f"bitmap {d:.0%} float16": (Structure.BITMAP, Values.HALF, d) for d in DENSITIES}
    forms |= {f"bitmap {d:.0%} 4 bits": (Structure.BITMAP, Values.CODE4, d) for d in (0.3, 0.5)}
    forms |= {"balanced 16:32 float16": (Structure.BALANCED, Values.HALF, 0.5), "balanced 16:32 4 bits": (Structure.BALANCED, Values.CODE4, 0.5)}
    forms |= {"2:4 float16": (Structure.TWO_OF_FOUR, Values.HALF, 0.5), "2:4 4 bits": (Structure.TWO_OF_FOUR, Values.CODE4, 0.5)}
    forms |= {"4 bits": (Structure.DENSE, Values.CODE4, 1.0), "8 bits": (Structure.DENSE, Values.CODE8, 1.0)}
    forms |= {"4 bits shared table": (Structure.DENSE, Values.SHARED, 1.0), "4 bits row tables": (Structure.DENSE, Values.ROWS, 1.0)}
    built = {name: lambda f=form: build(*f) for name, form in forms.items()}
    return built | {"4 bits groups of 128": lambda: build(Structure.DENSE, Values.CODE4, 1.0, 128)}


def _coded(kind: Values, present: Tensor, group: int | None, structure: Structure, tile: Tile) -> tuple[Packed, Tensor]:
    """Random codes with scales of rows or groups, zero points or tables; and what they stand for."""
    rows, columns = present.shape
    codes = torch.randint(0, 2**kind.bits, (rows, columns), device=DEVICE, dtype=torch.uint8)
    scale = torch.full((rows, -(-columns // group) if group else 1), 1 / 256, device=DEVICE).half()
    zero, table = None, None
    if kind in (Values.CODE4, Values.CODE8):
        zero = torch.full(scale.shape, 2.0 ** (kind.bits - 1), device=DEVICE).half()
        value = codes.half() - zero[0, 0]
    elif kind is Values.SHARED:
        table = torch.randn(1, 16, device=DEVICE).half()
        value = table[0][codes.int()]
    else:
        table = torch.randint(-127, 128, (rows, 16), device=DEVICE).to(torch.int8)
        value = table.half().gather(1, codes.long())
    source = Source(kind=kind, values=codes, dtype=torch.float16, present=present, scale=scale, zero=zero, table=table, group=group)
    return pack(source, structure, tile).to(DEVICE), value * scale[0, 0] * present
