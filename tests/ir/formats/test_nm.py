"""N:M sparsity: places round-trip, and what is not N:M is refused."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import FormatError
from fxpress.ir.formats.balanced import Balanced
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.nm import Nm

from .sparse_cases import DENSITIES, INNER, weight


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 6), (8, 16), (1, 2)])
def test_it_keeps_what_balanced_keeps(density: float, keep: int, group: int) -> None:
    matrix, fmt = weight(7, 96, density), Nm(keep=keep, group=group)
    payload = fmt.encode(matrix)
    fmt.check_payload(payload, 7, 96, torch.float32, "here")
    other = Balanced(keep=keep, group=group)
    assert torch.equal(fmt.decode(payload, 7, 96, torch.float32), other.decode(other.encode(matrix), 7, 96, torch.float32))


@pytest.mark.parametrize("values", INNER)
def test_dropping_codes_of_zeros_changes_nothing(values: str) -> None:
    inner, fmt = parse_format(values), Nm(values=values)
    quantized = inner.encode(Nm().decode(Nm().encode(weight(33, 96, 1.1)), 33, 96, torch.float32))
    before = inner.decode(quantized, 33, 96, torch.float32)
    present = fmt.choose(before)
    if not bool((before != 0)[~present].any()):
        assert torch.equal(fmt.decode(fmt.pack(present, quantized), 33, 96, torch.float32), before)
    else:
        assert "lut" in values


def test_bits_per_weight_count_everything() -> None:
    assert Nm().bits_per_weight(64, 64, torch.float16) == 9.0
    assert Nm(keep=1).bits_per_weight(64, 64, torch.float16) == 4.5


def test_what_does_not_go_together_is_refused() -> None:
    assert Nm().why_illegal(4, 30) == "groups of 4 do not divide its 30 columns; use balanced"
    with pytest.raises(FormatError, match="keep=4 of group=4"):
        Nm(keep=4)
    with pytest.raises(FormatError, match="do not keep exactly 2 of 4"):
        Nm(keep=2).pack(torch.tensor([[True, True, True, False, True, False, False, False]]), {"values": torch.ones(1, 8)})
