"""Biases, and sites that fxpress operators cannot stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.errors import EditError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.formats.dense import Dense
from fxpress.ir.journal import Action
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.site_calls import why_not_compressible
from fxpress.ir.sites import site_named

from ..checks import assert_same, compress
from ..tiny import randn


@pytest.mark.parametrize(("model", "name"), [("mlp", "up"), ("mlp", "down"), ("conv", "conv1"), ("conv", "conv2"), ("conv1d", "conv1")])
@pytest.mark.parametrize("compressed", [False, True])
def test_set_bias(model: str, name: str, compressed: bool, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    if compressed:
        compress(program, site_named(program, name), Affine(bits=4, group_size=4))
    site = site_named(program, name)
    bias, old = randn(site.rows, seed=3), get_tensor(program.graph_module, site.bias).detach() if site.bias else torch.zeros(site.rows)
    before = intermediate(program, site.node.name)
    with Editor(program, "test") as editor:
        editor.set_bias(site, bias, "why")
    shape = (-1, *[1] * (before.dim() - 2)) if "conv" in name else (-1,)
    torch.testing.assert_close(intermediate(program, site.node.name), before + (bias - old).reshape(shape))
    assert program.journal.changes[-1].action is Action.REWEIGHTED
    program.verify()


def intermediate(program: Program, name: str) -> Tensor:
    """Value of one node on the example inputs."""
    values: dict[str, Any] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            """Keep every value."""
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Watch(program.graph_module).run(*program.inputs.leaves)
    return values[name]


def test_set_bias_of_addmm(captured: Callable[[str], Program]) -> None:
    program = captured("gpt2")
    site = next(s for s in program.sites() if s.transposed)
    matrix, bias = site.matrix(), randn(site.rows)
    x = intermediate(program, site.data.name)
    with Editor(program, "test") as editor:
        editor.set_bias(site, bias, "why")
    program.verify()
    torch.testing.assert_close(intermediate(program, site.node.name), F.linear(x, matrix, bias))


def test_set_bias_leaves_a_shared_bias_to_the_others(captured: Callable[[str], Program]) -> None:
    program = captured("repeated")
    old = get_tensor(program.graph_module, "step.bias").clone()
    with Editor(program, "test") as editor:
        editor.set_bias(site_named(program, "step"), old + 1, "why")
    first, second = (site_named(program, n).bias for n in ("step", "step#2"))
    assert_same(get_tensor(program.graph_module, str(first)), old + 1)
    assert_same(get_tensor(program.graph_module, str(second)).detach(), old)


class SharedBias(nn.Module):
    """Two products that add one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w, self.b = nn.Parameter(randn(4, 4)), nn.Parameter(randn(4, 4, seed=1)), nn.Parameter(randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 4] -> [N, 4]`."""
        return torch.addmm(self.b, x, self.v) * torch.addmm(self.b, x, self.w)


def test_set_bias_of_one_addmm_of_two() -> None:
    program = capture(SharedBias(), randn(3, 4))
    v, w = (s.matrix() for s in program.sites())
    old, new, x = get_tensor(program.graph_module, "b").detach(), randn(4, seed=2), program.inputs.leaves[0]
    with Editor(program, "test") as editor:
        editor.set_bias(site_named(program, "w"), new, "why")
    torch.testing.assert_close(program.run_examples(), F.linear(x, v, old) * F.linear(x, w, new))


def test_sites_called_after_bare_parameters() -> None:
    program = capture(SharedBias(), randn(3, 4))
    expected = program.run_examples()
    for _ in range(2):
        for name in ("v", "w"):
            compress(program, site_named(program, name), Dense())
        program.verify()
        again = capture(program.to_exported())
        assert_same(again.run_examples(), program.run_examples())
        torch.testing.assert_close(again.run_examples(), expected)
        assert [s.name for s in again.sites()] == ["v", "w"]
        for name in ("v", "w"):
            with Editor(program, "test") as editor:
                editor.decompress(site_named(program, name), "why")
        assert [s.name for s in program.sites()] == ["v", "w"]
    torch.testing.assert_close(program.run_examples(), expected)


class Awkward(nn.Module):
    """Sites that fxpress operators cannot stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(randn(4, 4)), nn.Parameter(randn(2, 4))
        self.even = nn.Conv1d(2, 2, 2, padding="same")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[2, 4]`."""
        return (
            torch.addmm(self.b, x, self.w),
            torch.addmm(x, x, self.w),
            torch.addmm(self.b[0], x, self.w, alpha=2),
            self.even(x),
            F.linear(x, self.w, self.b[0]),
        )


def test_sites_without_a_counterpart_say_why() -> None:
    program = capture(Awkward(), randn(2, 4))
    reasons = [why_not_compressible(s) for s in program.sites()]
    assert reasons == [
        "addmm that adds something other than a stored bias [4]",
        "addmm that adds something other than a stored bias [4]",
        "addmm with alpha or beta other than 1",
        "padding 'same' that needs different amounts on both sides",
        None,
    ]
    fmt = Dense()
    for site in [s for s, why in zip(program.sites(), reasons, strict=True) if why]:
        with pytest.raises(EditError), Editor(program, "test") as editor:
            editor.compress(site, fmt, fmt.encode(site.matrix()), "why")
    with pytest.raises(EditError, match="its bias is computed, not stored"), Editor(program, "test") as editor:
        editor.set_bias(program.sites()[4], randn(4), "why")


def test_computed_bias_survives_compression() -> None:
    program = capture(Awkward(), randn(2, 4))
    expected = program.run_examples()
    compress(program, program.sites()[4], Dense())
    assert_same(program.run_examples(), expected)
