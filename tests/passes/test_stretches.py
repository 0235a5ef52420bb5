"""Stretches: what they compute is what the program computes; they hold what crosses a cut and nothing else; weights of one's own and gradients."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.errors import PassError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.weights import named_tensors
from fxpress.passes.context import Call
from fxpress.passes.stretches import Stretches
from fxpress.passes.tapped import Tapped

from ..checks import assert_same
from .healing_nets import batch, compressed, context, tower

CALLS: list[Call] = [((batch(s),), {}) for s in (1, 2)]


def ends() -> list[str]:
    return [n.name for n in tower().graph.nodes if n.target is torch.ops.aten.add.Tensor and n.args[0].op == "call_function" and len(n.all_input_nodes) == 2]


def test_the_ends_are_bit_equal_to_a_whole_run() -> None:
    names, program = ends(), tower()
    assert len(names) == 3
    stretches, whole = Stretches(program, CALLS, names), Tapped(program, names)
    with torch.no_grad():
        wanted = [whole(c).hidden for c in CALLS]
    for i in range(3):
        assert_same(stretches.advance(), [w[i] for w in wanted])


def test_only_values_read_later_are_held() -> None:
    stretches = Stretches(tower(), CALLS, ends())
    stretches.advance()
    held = [{tuple(v.shape) for v in values.values()} for values in stretches._values]
    assert held == [{(4, 8, 12), (8, 1)}] * 2  # the stream and the scale
    stretches.advance()
    stretches.advance()
    assert [list(v) for v in stretches._values] == [[], []]


def test_tensors_stand_in_and_get_gradients_and_the_program_stays() -> None:
    program, (first, *_) = tower(), ends()
    before = {n: t.detach().clone() for n, t in named_tensors(program.graph_module)}
    stretches = Stretches(program, CALLS, [first])
    weight = get_tensor(program.graph_module, "layers.0.up.weight").detach().clone().requires_grad_()
    plain = stretches.end(0, {})
    same = stretches.end(0, {"layers.0.up.weight": weight})
    same.square().sum().backward()
    assert torch.equal(plain, same.detach()) and not plain.requires_grad and weight.grad is not None and float(weight.grad.abs().sum()) > 0
    stretches.tensors["layers.0.up.weight"] = torch.zeros_like(before["layers.0.up.weight"])
    assert not torch.equal(stretches.advance()[0], plain)
    assert_same({n: t.detach() for n, t in named_tensors(program.graph_module)}, before)


def test_compressed_sites_run() -> None:
    program = compressed(tower(), "quantize_rtn{bits=8}")
    (end,) = (n.name for n in program.graph.nodes if n.name == ends()[-1])
    (value,) = Stretches(program, CALLS[:1], [end]).advance()
    with torch.no_grad():
        assert_same(value, Tapped(program, [end])(CALLS[0]).hidden[0])


def test_cuts_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(PassError, match="has no node nowhere"):
        Stretches(tower(), CALLS, ["nowhere"])
    with pytest.raises(PassError, match="does not come behind"):
        Stretches(tower(), context(tower()).calibration, ends()[::-1])
