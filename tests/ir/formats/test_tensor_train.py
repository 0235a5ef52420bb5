"""Tensor trains as storage: exact at exact bonds, padded sizes, sizes that do not fit."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import SpecError
from fxpress.ir.formats.base import parse_format
from fxpress.ir.formats.tensor_train import TensorTrain
from fxpress.ir.trains import full_bonds


@pytest.mark.parametrize(("outputs", "inputs", "shape"), [((4, 4, 4), (3, 4, 4), (64, 48)), ((4, 4, 4), (3, 4, 4), (61, 47)), ((2, 3), (5, 1), (6, 5))])
def test_exact_bonds_are_exact(outputs: tuple[int, ...], inputs: tuple[int, ...], shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    fmt = TensorTrain(outputs=outputs, inputs=inputs, bonds=full_bonds(outputs, inputs))
    payload = fmt.encode(matrix)
    fmt.check_payload(payload, *shape, torch.float32, "here")
    assert torch.allclose(fmt.decode(payload, *shape, torch.float32), matrix, atol=1e-5)
    assert fmt.why_illegal(*shape) is None


def test_fewer_bonds_store_less_and_keep_the_largest_part() -> None:
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, 64)
    errors = []
    for bond in (1, 4, 12):
        fmt = TensorTrain(outputs=(4, 4, 4), inputs=(4, 4, 4), bonds=(bond, bond))
        errors.append(float((fmt.decode(fmt.encode(matrix.half()), 64, 64, torch.float16).float() - matrix).norm()))
        assert fmt.nbytes(64, 64, torch.float16) == 2 * (16 * bond + 16 * bond**2 + 16 * bond)
    assert errors[0] > errors[1] > errors[2]


def test_sizes_that_do_not_fit_are_refused() -> None:
    fmt = TensorTrain(outputs=(4, 4), inputs=(4, 4), bonds=(8,))
    assert fmt.why_illegal(17, 16) == "modes [4, 4] hold 16 of its 17 rows" and parse_format(fmt.to_spec()) == fmt
    for sizes in ("outputs=[4],inputs=[4],bonds=[]", "outputs=[4,4],inputs=[4],bonds=[2]", "outputs=[4,0],inputs=[4,4],bonds=[2]"):
        with pytest.raises(SpecError, match="as many outputs as inputs"):
            parse_format(f"tensor_train{{{sizes}}}")
    with pytest.raises(SpecError, match="bond 0 is 17; 16 is exact already"):
        TensorTrain(outputs=(4, 4), inputs=(4, 4), bonds=(17,))
