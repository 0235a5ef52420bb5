"""Chains compute what their links say, survive text, and take a site's place in a graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxpress.ir.capture import capture
from fxpress.ir.chain import Chain, Convolution, Flatten, Product, Swap, Unflatten, from_json, parameters, run, to_json, weighted, with_dtype
from fxpress.ir.edit import Editor
from fxpress.ir.errors import EditError
from fxpress.ir.journal import Action

from ..passes.nets import TiedNet


def _kronecker() -> Chain:
    """The sum of 3 Kronecker products, `[2 * 3, 4 * 5]`."""
    inner, outer = torch.randn(3 * 3, 5), torch.randn(2, 4 * 3)
    moves = (Unflatten(sizes=(3, 3)), Swap(), Swap(first=-3, second=-2), Flatten())
    return Unflatten(sizes=(4, 5)), Product(name="inner", weight=inner), *moves, Product(name="outer", weight=outer), Swap(), Flatten()


def test_a_chain_of_products_and_moves() -> None:
    torch.manual_seed(0)
    chain = _kronecker()
    inner, outer = (link.weight for link in weighted(chain))
    dense = torch.stack([torch.kron(outer.view(2, 4, 3)[:, :, c], inner.view(3, 3, 5)[c]) for c in range(3)]).sum(0)
    x = torch.randn(7, 2, 20)
    assert torch.allclose(run(chain, x), x @ dense.t(), atol=1e-5)
    assert parameters(chain) == inner.numel() + outer.numel()


def test_text_and_back() -> None:
    conv = Convolution(name="space", weight=torch.randn(4, 1, 3, 3), stride=(1, 2), padding=(1, 1), dilation=(1, 1), groups=4)
    chain = (*_kronecker(), conv)
    again = from_json(to_json(chain), {link.name: link.weight for link in weighted(chain)})
    assert to_json(again) == to_json(chain) and all(a.weight is b.weight for a, b in zip(weighted(again), weighted(chain), strict=True))
    assert all(link.weight.dtype is torch.float16 for link in weighted(with_dtype(chain, torch.float16)))


def test_convolutions_keep_their_geometry() -> None:
    x, weight, bias = torch.randn(2, 4, 9, 9), torch.randn(6, 2, 3, 3), torch.randn(6)
    link = Convolution(name="space", weight=weight, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    assert torch.equal(run((link,), x, bias), F.conv2d(x, weight, bias, (2, 1), (1, 0), (1, 2), 2))


def test_factors_take_the_site_s_place() -> None:
    program = capture(TiedNet().eval(), (torch.randint(50, (2, 6)),), dynamic_shapes={"ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}})
    clone = program.clone()
    site = next(s for s in clone.sites() if s.name == "up")
    u, s, v = torch.linalg.svd(site.matrix(), full_matrices=False)
    with Editor(clone, "test") as editor:
        editor.factorize(site, (Product(name="down", weight=s.unsqueeze(1) * v), Product(name="up", weight=u)), "why", {"rank": 32.0})
    clone.verify()
    assert [s.name for s in clone.sites()] == ["embed", "up.down", "up.up", "down", "head"]
    assert [s.bias for s in clone.sites()][1:3] == [None, "up.bias"]
    for shape in ((2, 6), (3, 9)):
        ids = torch.randint(50, shape)
        assert torch.allclose(clone.run(ids), program.run(ids), atol=1e-5)
    change = clone.journal.changes[-1]
    assert change.action is Action.REPLACED and change.after is not None and change.after.parameters == 32 * 32 + 64 * 32 and change.facts == {"rank": 32.0}


def test_a_chain_of_another_shape_is_refused() -> None:
    program = capture(TiedNet().eval(), (torch.randint(50, (2, 6)),)).clone()
    site = next(s for s in program.sites() if s.name == "down")
    with pytest.raises(EditError, match=r"the chain makes .*33.*, expected .*32"):
        Editor(program, "test").factorize(site, (Product(name="only", weight=torch.randn(33, 64)),), "why")
