"""The kernels against float64: every structure, kind of value, dtype and density, ragged shapes, splits, poisoned memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fxpress.codegen.triton_target import launch
from fxpress.codegen.triton_target.launch import decode, matmul
from fxpress.codegen.triton_target.layout import Structure, Tile, Values
from fxpress.codegen.triton_target.pack import Source, pack
from fxpress.codegen.triton_target.schedule import Schedule

from .weights import DEVICE, kept_of_group, random_mask, random_source

DTYPES = (torch.float16, torch.bfloat16)
AFFINE = (Values.CODE4, Values.CODE8)
SMALL = Tile(rows=16, columns=64)
ROWS, COLUMNS = 20, 160  # neither is a multiple of the tile


def check(source: Source, weight: Tensor, structure: Structure, tile: Tile = SMALL, tokens: int = 3, splits: int = 1, biased: bool = True) -> None:
    """Decoding is exact to the dtype's rounding; the product is no farther from float64 than rounding its result, and the plain product's own error, allow."""
    packed = pack(source, structure, tile).to(DEVICE)
    rounded = weight.float().to(source.dtype)
    assert torch.equal(decode(packed).cpu(), rounded)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(7)).to(source.dtype)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(8)) if biased else None
    added = bias.double() if bias is not None else torch.zeros(weight.shape[0], dtype=torch.float64)
    exact = x.double() @ weight.t() + added
    plain = ((x @ rounded.t()).double() + added - exact).abs().amax()
    result = matmul(packed, x.to(DEVICE), bias.to(DEVICE) if bias is not None else None, Schedule(tokens=8 if tokens <= 8 else 16, splits=splits)).cpu()
    assert result.dtype is source.dtype
    allowed = torch.finfo(source.dtype).eps * exact.abs() / 2 + plain + 1e-6
    assert bool(((result.double() - exact).abs() <= allowed).all())


def _mask(structure: Structure, density: float = 0.5) -> Tensor:
    if structure is Structure.DENSE:
        return torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    if structure is Structure.TWO_OF_FOUR:
        return kept_of_group(ROWS, COLUMNS, 2, 4)
    return kept_of_group(ROWS, COLUMNS, 16, 32) if structure is Structure.BALANCED else random_mask(ROWS, COLUMNS, density)


def _illegal(structure: Structure, kind: Values) -> bool:
    return (structure is Structure.TWO_OF_FOUR and kind in (Values.SHARED, Values.ROWS)) or (structure is Structure.BITMAP and kind is Values.ROWS)


@pytest.mark.parametrize(
    ("structure", "kind"),
    [(s, k) for s in (Structure.DENSE, Structure.BALANCED, Structure.BITMAP) for k in (Values.HALF, Values.CODE4, Values.ROWS) if not _illegal(s, k)],
)
def test_the_form_for_hopper_means_the_same(monkeypatch: pytest.MonkeyPatch, structure: Structure, kind: Values) -> None:
    monkeypatch.setattr(launch, "hopper", lambda device: True)
    for tile in (SMALL, *([Tile(rows=64, columns=128)] if kind is not Values.ROWS else [])):  # the table of rows takes the interpreter long
        check(*random_source(kind, torch.float16, _mask(structure)), structure, tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("structure", "kind"), [(s, k) for s in Structure for k in Values if not _illegal(s, k)])
def test_every_structure_with_every_kind_of_value(structure: Structure, kind: Values, dtype: torch.dtype) -> None:
    check(*random_source(kind, dtype, _mask(structure)), structure)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", list(Structure))
@pytest.mark.parametrize("kind", AFFINE)
def test_scales_and_zero_points_of_groups_and_splits_along_k(structure: Structure, kind: Values, dtype: torch.dtype) -> None:
    check(*random_source(kind, dtype, _mask(structure), group=64), structure, splits=2)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_any_width(group: int) -> None:
    check(*random_source(Values.CODE4, torch.float16, _mask(Structure.DENSE), group=group), Structure.DENSE)


def test_narrow_scales_and_equal_zero_points() -> None:
    source, _ = random_source(Values.CODE4, torch.float16, _mask(Structure.BALANCED), group=64)
    assert source.scale is not None and source.zero is not None
    scale, zero = source.scale.half(), torch.full_like(source.zero, 8.0)
    for zeros in (zero, source.zero):
        exact = (source.values.double() - zeros.double().repeat_interleave(64, 1)[:, :COLUMNS]) * scale.double().repeat_interleave(64, 1)[:, :COLUMNS]
        check(replace(source, scale=scale, zero=zeros), exact * _mask(Structure.BALANCED), Structure.BALANCED)


@pytest.mark.parametrize("entries", [3, 4, 8, 11])
@pytest.mark.parametrize("kind", [Values.SHARED, Values.ROWS])
def test_tables_of_any_size(kind: Values, entries: int) -> None:
    check(*random_source(kind, torch.float16, _mask(Structure.DENSE), entries=entries), Structure.DENSE)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.5, 0.7, 0.9, 1.1])
@pytest.mark.parametrize("structure", [Structure.BITMAP, Structure.BALANCED])
@pytest.mark.parametrize("kind", [Values.HALF, Values.CODE4])
def test_any_density_is_exact(structure: Structure, kind: Values, density: float) -> None:
    check(*random_source(kind, torch.float16, random_mask(ROWS, COLUMNS, density)), structure, splits=2, biased=False)


def _structured() -> dict[str, Tensor]:
    masks = {name: torch.zeros(ROWS, COLUMNS, dtype=torch.bool) for name in ("one weight", "last weight", "empty rows", "full tile", "one column", "full rows")}
    masks["one weight"][3, 37] = True
    masks["last weight"][-1, -1] = True
    masks["empty rows"][::3] = random_mask(ROWS, COLUMNS, 0.6)[::3]
    masks["full tile"][:16, :64] = True
    masks["one column"][:, 63] = True
    masks["full rows"][5:7] = True
    return masks


@pytest.mark.parametrize("name", list(_structured()))
@pytest.mark.parametrize("structure", [Structure.BITMAP, Structure.BALANCED])
def test_structured_masks(structure: Structure, name: str) -> None:
    check(*random_source(Values.HALF, torch.float16, _structured()[name]), structure)


@pytest.mark.parametrize("structure", list(Structure))
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (33, 72), (40, 130)])
def test_ragged_shapes(structure: Structure, shape: tuple[int, int]) -> None:
    rows, columns = shape
    mask = kept_of_group(rows, columns, 2, 4) if structure is Structure.TWO_OF_FOUR else random_mask(rows, columns, 0.4)
    present = torch.ones_like(mask) if structure is Structure.DENSE else mask
    check(*random_source(Values.HALF, torch.float16, present), structure, tokens=17)


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_any_number_of_tokens(tokens: int) -> None:
    check(*random_source(Values.CODE4, torch.float16, _mask(Structure.BITMAP)), Structure.BITMAP, tokens=tokens, splits=3)


def test_the_order_of_splits_is_fixed() -> None:
    packed = pack(random_source(Values.HALF, torch.float16, _mask(Structure.BALANCED))[0], Structure.BALANCED, SMALL).to(DEVICE)
    x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    results = [matmul(packed, x, None, Schedule(splits=3)) for _ in range(3)]
    assert all(torch.equal(r, results[0]) for r in results)


def test_nothing_is_read_from_what_was_in_memory_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspaces are allocated full of nan; every element must be written, and none read."""
    real = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made: Tensor = real(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    source, weight = random_source(Values.HALF, torch.float16, _mask(Structure.BITMAP))
    monkeypatch.setattr(torch, "empty", poisoned)
    check(source, weight, Structure.BITMAP, splits=2)
    check(source, weight, Structure.BITMAP)
