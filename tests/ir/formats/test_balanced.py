"""Balanced sparsity: exactly so many of every group, exact where the weight fits, a short last group included."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import FormatError
from fxpress.ir.formats.balanced import Balanced
from fxpress.ir.formats.base import parse_format

from .sparse_cases import DENSITIES, INNER, SHAPES, weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("keep", "group"), [(16, 32), (4, 8), (3, 24), (1, 16)])
def test_the_largest_of_every_group_are_kept_exactly(shape: tuple[int, int], density: float, keep: int, group: int) -> None:
    matrix, fmt = weight(*shape, density), Balanced(keep=keep, group=group)
    payload = fmt.encode(matrix)
    fmt.check_payload(payload, *shape, torch.float32, "here")
    decoded = fmt.decode(payload, *shape, torch.float32)
    for start in range(0, shape[1], group):
        for row, kept in zip(matrix[:, start : start + group], decoded[:, start : start + group], strict=True):
            best = row.abs().sort(descending=True).values[:keep]
            assert torch.equal(kept.abs().sort(descending=True).values[: len(best)], best) and torch.equal(kept[kept != 0], row[kept != 0])
            assert int((kept != 0).sum()) <= keep


@pytest.mark.parametrize("values", INNER)
def test_dropping_codes_of_zeros_changes_nothing(values: str) -> None:
    inner = parse_format(values)
    quantized = inner.encode(Balanced().decode(Balanced().encode(weight(33, 100, 1.1)), 33, 100, torch.float32))
    before = inner.decode(quantized, 33, 100, torch.float32)
    fmt = Balanced(values=values)
    present = fmt.choose(before)
    if not bool((before != 0)[~present].any()):  # a table without an entry for 0 makes zeros something else
        assert torch.equal(fmt.decode(fmt.pack(present, quantized), 33, 100, torch.float32), before)
    else:
        assert "lut" in values


def test_bits_per_weight_count_everything() -> None:
    assert Balanced().bits_per_weight(64, 64, torch.float16) == 9.0
    assert Balanced(keep=8).bits_per_weight(64, 64, torch.bfloat16) == 5.0
    assert Balanced(values="affine{bits=4,symmetric=true}").bits_per_weight(64, 64, torch.float16) == 3 + 16 / 64


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(FormatError, match="keep=32 of group=32"):
        Balanced(keep=32)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, :32] = True
    with pytest.raises(FormatError, match="do not keep exactly 16 of 32"):
        Balanced().pack(mask, {"values": torch.ones(1, 64)})
