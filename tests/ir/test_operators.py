"""The composed form of matrix product operators: exact, over the same cores, and only where it is cheaper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir.operators import composed, find_operators
from fxpress.ir.program import Program
from fxpress.passes import training
from fxpress.passes.context import Context
from fxpress.passes.examples import Labelled, as_examples
from fxpress.passes.training_options import TrainingOptions

from ..passes.nets import correlated


def factorized(family: int, rows: int = 53, columns: int = 37) -> tuple[Program, Tensor]:
    """Two linears in float64, one with a bias, as operators."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(columns, rows), nn.ReLU(), nn.Linear(rows, columns, bias=False)).double().eval()
    x = correlated(64, columns).double()
    batch = {"input": {0: torch.export.Dim.AUTO}}
    recipe = f"factorize_mpo{{ratio=0.6,family={family},refine=0}}"
    return fxpress.optimize(net, recipe, example_inputs=(x,), dynamic_shapes=batch, calibration=[x]).program, x


@pytest.mark.parametrize(("family", "rows", "columns"), [(2, 53, 37), (4, 29, 37), (8, 64, 32), (8, 32, 64), (0, 64, 64)])
def test_composed_is_exact_and_shares_the_cores(family: int, rows: int, columns: int) -> None:
    program, x = factorized(family, rows, columns)
    one = composed(program, 1e9)
    one.verify()
    assert [o.name for o in find_operators(program)] == ["0", "2"] and find_operators(one) == []
    assert (one.run(x) - program.run(x)).abs().max() < 1e-12 and one.run(x[:3]).shape == (3, columns)
    assert one.nbytes == program.nbytes and one.graph_module.get_parameter("0.inner.weight") is program.graph_module.get_parameter("0.inner.weight")


def test_multiplications_are_those_of_the_modes() -> None:
    program, x = factorized(4, 64, 64)
    (one, _), (a, b, c, d) = find_operators(program), (16, 4, 4, 16)
    assert one.modes == (a, b, c, d) and one.bond == int(0.6 * 64 * 64 / 128) == 19
    assert one.multiplications == 19 * (c * b * d + b * a * c) and one.composed_multiplications(100) == 64 * 64 + 64 * 64 * 0.19
    assert len(x) == 64


def test_only_what_is_cheaper_is_composed() -> None:
    program, _ = factorized(4)
    assert composed(program, 2.0) is program  # so few tokens do not pay for the product
    pairs, _ = factorized(1)
    assert find_operators(pairs) == [] and composed(pairs, 1e9) is pairs


def test_cores_that_others_see_or_that_are_packed_stay() -> None:
    program, _ = factorized(4)
    packed = fxpress.optimize(program, "quantize_rtn{bits=8,only=['0.inner']}").program
    assert [o.name for o in find_operators(packed)] == ["2"]


def test_training_runs_composed_and_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = factorized(4, 64, 64)
    answer = torch.ones(512, 64, dtype=torch.float64)
    data = as_examples([Labelled(correlated(512, 64, seed=i).double(), answer) for i in range(4)], program.inputs)
    context, options = Context(loss=lambda o, t: (o - t).square().mean()), TrainingOptions(steps=6, lr=1e-2, evaluate_every=2)
    ran: list[Program] = []

    def compose(program: Program, tokens: float) -> Program:
        ran.append(composed(program, tokens))
        return ran[-1]

    monkeypatch.setattr(training, "composed", compose)
    one = training.fine_tune(program, None, data, options, context)
    monkeypatch.setattr(training, "composed", lambda p, _: p)
    other = training.fine_tune(program, None, data, options, context)
    assert find_operators(ran[0]) == [] and one.after < one.before and {"0.inner.weight", "2.outer.weight"} <= set(one.tensors)
    assert all((one.tensors[n] - other.tensors[n]).abs().max() < 1e-9 for n in other.tensors)
