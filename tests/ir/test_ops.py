"""The custom operators: what decode plus the plain operator gives, traceable, with right fake shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxpress.ir import ops
from fxpress.ir.formats.base import parse_format

from ..checks import assert_same
from ..tiny import randn

AFFINE, DENSE = "affine{bits=4,group_size=4}", "dense{storage=float16}"


def stored(shape: tuple[int, ...], spec: str) -> list[Tensor]:
    return list(parse_format(spec).encode(randn(shape[0], *shape[1:]).flatten(1)).values())


def decoded(payload: list[Tensor], spec: str, shape: tuple[int, ...]) -> Tensor:
    return ops.decode_weight(payload, spec, shape, torch.float32)


LINEAR, CONV1D, CONV2D, TABLE = (6, 10), (8, 2, 5), (8, 3, 3, 3), (11, 6)
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (torch.ops.fxpress.linear.default, (randn(2, 3, 10), stored(LINEAR, AFFINE), randn(6), AFFINE, LINEAR)),
    "linear, no bias": (torch.ops.fxpress.linear.default, (randn(4, 10), stored(LINEAR, DENSE), None, DENSE, LINEAR)),
    "linear on a vector": (torch.ops.fxpress.linear.default, (randn(10), stored(LINEAR, AFFINE), None, AFFINE, LINEAR)),
    "conv1d": (torch.ops.fxpress.conv.default, (randn(2, 4, 12), stored(CONV1D, AFFINE), randn(8), AFFINE, CONV1D, [2], [1], [2], 2)),
    "conv2d": (torch.ops.fxpress.conv.default, (randn(2, 3, 9, 8), stored(CONV2D, AFFINE), None, AFFINE, CONV2D, [1, 2], [0, 1], [2, 1], 1)),
    "embedding": (torch.ops.fxpress.embedding.default, (torch.tensor([[0, 10, 3]]), stored(TABLE, AFFINE), AFFINE, TABLE, torch.float32)),
    "embedding in half": (torch.ops.fxpress.embedding.default, (torch.tensor([1]), stored(TABLE, DENSE), DENSE, TABLE, torch.float16)),
}


def plain(name: str, args: tuple[Any, ...]) -> Tensor:
    """The plain operator on the decoded weight."""
    if name.startswith("embedding"):
        indices, payload, spec, shape, dtype = args
        return F.embedding(indices, ops.decode_weight(payload, spec, shape, dtype))
    x, payload, bias, spec, shape, *geometry = args
    operators: dict[str, Any] = {"linear": F.linear, "conv1d": F.conv1d, "conv2d": F.conv2d}
    return operators[name.partition(",")[0].partition(" ")[0]](x, decoded(payload, spec, shape), bias, *geometry)


@pytest.mark.parametrize("name", CASES)
def test_is_decode_then_the_plain_operator(name: str) -> None:
    operator, args = CASES[name]
    assert_same(operator(*args), plain(name, args))


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    operator, args = CASES[name]
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("embedding")])
def test_gradients_reach_data_and_bias_but_not_the_payload(name: str) -> None:
    operator, (x, payload, bias, *rest) = CASES[name]
    found = []
    for run in (operator, lambda *args: plain(name, args)):
        inputs = [t.clone().requires_grad_() for t in (x, bias) if t is not None]
        output = run(inputs[0], payload, inputs[1] if bias is not None else None, *rest)
        (output * randn(*output.shape, seed=1)).sum().backward()
        found.append([t.grad for t in inputs])
    torch.testing.assert_close(*found)
    assert all(t.grad is None for t in payload)


@pytest.mark.parametrize("name", CASES)
def test_fake_shape_and_type(name: str) -> None:
    operator, args = CASES[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = operator(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
    real = operator(*args)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_decodes_inside_the_operator(bits: int) -> None:
    spec = f"affine{{bits={bits},group_size=7}}"
    payload, x = stored(LINEAR, spec), randn(3, 10)
    assert_same(torch.ops.fxpress.linear(x, payload, None, spec, LINEAR), F.linear(x, decoded(payload, spec, LINEAR)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weight_decodes_to_the_type_of_the_data(dtype: torch.dtype) -> None:
    x, payload = randn(3, 10).to(dtype), stored(LINEAR, AFFINE)
    assert torch.ops.fxpress.linear(x, payload, None, AFFINE, LINEAR).dtype == dtype


def test_exports_with_a_dynamic_batch() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, tensor in enumerate(stored(LINEAR, AFFINE)):
                self.register_buffer(f"payload{i}", tensor)

        def forward(self, x: Tensor) -> Tensor:
            """`[N, 10] -> [N, 6]`."""
            return torch.ops.fxpress.linear(x, [self.payload0, self.payload1, self.payload2], None, AFFINE, LINEAR)

    exported = torch.export.export(Net(), (randn(4, 10),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    assert any(n.target is torch.ops.fxpress.linear.default for n in exported.graph.nodes)
    x = randn(9, 10)
    assert_same(exported.module()(x), Net()(x))
