"""One-way convolutions in a graph: shapes, both forms of one set of filters, found again by name, geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.edit import Editor
from fxpress.ir.oneway import chain_of, compose, factor, filter_shapes, find_oneways, kernel, kernel_axes
from fxpress.ir.sites import SiteKind

CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "2d": (nn.Conv2d, (8, 12, (3, 5)), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, (2, 8, 14, 16)),
    "groups": (nn.Conv2d, (8, 12, 3), {"groups": 4, "padding": 1}, (2, 8, 9, 9)),
    "depthwise": (nn.Conv2d, (8, 16, 5), {"groups": 8, "padding": 2, "stride": 2}, (2, 8, 9, 9)),
    "one channel": (nn.Conv2d, (1, 16, 5), {"padding": 2}, (2, 1, 9, 9)),
    "flat": (nn.Conv2d, (8, 12, (1, 5)), {"stride": (2, 1), "padding": (1, 2), "bias": False}, (2, 8, 9, 9)),
    "1d": (nn.Conv1d, (8, 12, 5), {"stride": 2, "padding": 2}, (2, 8, 20)),
    "3d": (nn.Conv3d, (4, 6, 3), {"padding": 1, "stride": (1, 2, 1)}, (2, 4, 6, 6, 6)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("terms", [1, 3])
def test_chain_kernel_and_both_forms_agree(name: str, terms: int) -> None:
    """In double precision: the filters one after another are a convolution with the kernel they stand for, and switching forms changes nothing stored."""
    made, arguments, geometry, shape = CASES[name]
    torch.manual_seed(0)
    conv = made(*arguments, **geometry)
    net, x = nn.Sequential(conv).double().eval(), torch.randn(shape, dtype=torch.float64)
    filters = {n: torch.randn(s, dtype=torch.float64) for n, s in filter_shapes(tuple(conv.weight.shape), terms).items()}
    assert kernel(filters).shape == conv.weight.shape
    with torch.no_grad():
        conv.weight.copy_(kernel(filters))
    program = fxpress.capture(net, (x,))
    expected = net(x)
    (site,) = program.sites()
    with Editor(program, "test") as editor:
        editor.factorize(site, chain_of(filters, _geometry(conv), conv.groups), "test")
    assert [s.name for s in program.sites()] == [f"0.{n}" for n in filters] and torch.allclose(program.run(x), expected)
    for change, sites in ((compose, 0), (factor, len(filters)), (compose, 0)):
        (one,) = find_oneways(program)
        assert one.name == "0" and one.composed == (change is factor) and list(one.filters) == list(filters)
        with Editor(program, "test") as editor:
            change(editor, one, "test")
        program.verify()
        assert len(program.sites()) == sites and torch.allclose(program.run(x), expected)
        assert all(torch.equal(program.graph_module.get_parameter(f"0.{n}.weight"), f) for n, f in filters.items())


def _geometry(conv: nn.Module) -> tuple[list[int], list[int], list[int]]:
    return list(conv.stride), list(conv.padding), list(conv.dilation)  # type: ignore[arg-type]


def test_shapes_and_kinds() -> None:
    assert kernel_axes((8, 4, 1, 5)) == [3]
    assert filter_shapes((8, 4, 3, 5), 2) == {"channels": (16, 4, 1, 1), "axis0": (16, 1, 3, 1), "axis1": (8, 2, 1, 5)}
    assert filter_shapes((8, 1, 3, 3), 1) == {"axis0": (8, 1, 3, 1), "axis1": (8, 1, 1, 3)}
    net, x = nn.Sequential(nn.Conv3d(4, 6, 3)).eval(), torch.randn(1, 4, 5, 5, 5)
    assert fxpress.capture(net, (x,)).sites()[0].kind is SiteKind.CONV3D


def test_what_is_no_chain_is_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, (3, 1), groups=4), nn.Conv2d(4, 4, (1, 3), groups=4)).eval()
    assert find_oneways(fxpress.capture(net, (torch.randn(1, 4, 9, 9),))) == []
