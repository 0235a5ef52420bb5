"""Removing indices for real: equal to zeroing them, to a rebuilt smaller model, and undone when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpress.ir.resize
from fxpress.ir.axes import analyze_axes
from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.errors import EditError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors
from fxpress.runtime.artifact import load, save

from ..grouping import some_slow
from ..masking import TOLERANCE, assert_removal_is_masking, captured_double, difference, divided, double, free, outputs, resized
from ..tiny import BUILDERS, SPREAD, fresh_program, randn, seeded, tiny

COMPARED = {"mlp": 1, "conv": 2, "grouped": 3, "depthwise": 1, "conv1d": 2, "llama": 6, "gpt2": 8, "vit": 6, "resnet": 4, "unet": 4}  # at least


@pytest.mark.parametrize("model", some_slow(BUILDERS, "llama_tied", "llama_eager", "opt"))
def test_removal_is_masking(model: str) -> None:
    compared = assert_removal_is_masking(double(fresh_program(model)))
    assert len(compared) >= COMPARED.get(model, 0)


@pytest.mark.parametrize("model", ["conv", "gpt2", "unet"])
def test_a_permutation_changes_nothing(model: str) -> None:
    program = double(fresh_program(model))
    kept = {c.name: torch.randperm(c.size, generator=seeded(i)).tolist() for i, c in enumerate(free(analyze_axes(program)))}
    assert difference(outputs(resized(program, kept)), outputs(program)) < TOLERANCE


@pytest.mark.parametrize("model", some_slow(["conv", "conv1d", "embedding", "opt"], "opt"))
def test_two_classes_at_once_are_one_after_the_other_and_sizes_still_vary(model: str) -> None:
    program, other = double(fresh_program(model)), tiny(model).other
    classes = [c for c in free(analyze_axes(program)) if c.size > 2][:3]
    kept = {c.name: divided(c, seed=i)[0].tolist() for i, c in enumerate(classes)}
    together, apart = resized(program, kept), program
    for name, indices in kept.items():
        apart = resized(apart, {name: indices})
    assert other is not None
    for call in (None, other):
        assert difference(outputs(together, call), outputs(apart, call)) == 0
    again = capture(together.to_exported())
    assert difference(outputs(again, other), outputs(together, other)) < TOLERANCE
    together.verify()


def test_the_residual_class_is_the_model_rebuilt_smaller() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(width: int) -> nn.Module:
        config = LlamaConfig(
            vocab_size=24, hidden_size=width, head_dim=4, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=16, use_cache=False, initializer_range=SPREAD,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    inputs = {"input_ids": torch.randint(24, (2, 5), generator=seeded()), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    large, small = (double(capture(llama(width), inputs)) for width in (16, 10))
    analysis = analyze_axes(large)
    one = analysis.class_named("model.embed_tokens.weight[1]")
    assert one.size == 16
    cut = resized(large, {one.name: torch.randperm(16, generator=seeded())[:10].tolist()})
    with Editor(small, "test") as editor:
        for name, _ in list(named_tensors(small.graph_module)):
            editor.set_tensor(name, get_tensor(cut.graph_module, name).detach())
    assert difference(outputs(cut), outputs(small)) < TOLERANCE


# --- random small nets -------------------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = (torch.relu, nn.functional.gelu, torch.sigmoid, torch.tanh)


class Attend(nn.Module):
    """Self-attention over the pixels by hand or fused, `heads` of 3."""

    def __init__(self, channels: int, heads: int, gate: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.gate, self.fused = heads, ACTIVATIONS[gate], fused
        self.qkv, self.o = nn.Linear(channels, heads * 9), nn.Linear(heads * 3, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, self.heads, 3)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(self.gate(q), self.gate(k), v)
        else:
            out = torch.softmax(self.gate(q) @ self.gate(k).transpose(-2, -1), -1) @ v
        return x + self.o(out.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Branch(nn.Module):
    """A convolution and an activation, added to the input, joined to it or multiplied with it."""

    def __init__(self, channels: int, kind: int, activation: int) -> None:
        super().__init__()
        self.conv, self.kind, self.activation = nn.Conv2d(channels, channels, 3, padding=1), kind, ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.conv(x))
        return (x + y, torch.cat([x, y], 1), x * y)[self.kind]


class Apply(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.number](x)


LAYERS = st.lists(st.tuples(st.sampled_from(["conv", "grouped", "depthwise", "norm", "group_norm", "act", "branch", "attend"]),
                            st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=5)  # fmt: skip


def random_net(layers: list[tuple[str, int, int]], flat: bool) -> nn.Module:
    channels = 4
    modules: list[nn.Module] = [nn.Conv2d(2, 4, 1)]
    for kind, a, b in layers:
        if kind == "conv":
            modules.append(nn.Conv2d(channels, channels := 4 + 2 * (a % 3), 1 + 2 * (b % 2), padding=b % 2))
        elif kind == "grouped":
            modules.append(nn.Conv2d(channels, channels := 2 * (2 + a), 1, groups=2))
        elif kind == "depthwise":
            modules.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
        elif kind in ("norm", "group_norm"):
            modules.append(nn.BatchNorm2d(channels) if kind == "norm" else nn.GroupNorm(2, channels))
        elif kind == "act":
            modules.append(Apply(b))
        elif kind == "branch" and channels < 16:
            modules.append(Branch(channels, a % 3, b))
            channels *= 2 if a % 3 == 1 else 1
        elif kind == "attend":
            modules.append(Attend(channels, 1 + a % 3, b, a > 2))
    if flat:
        return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels * 9, 3))
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


@settings(max_examples=12)
@given(LAYERS, st.booleans())
def test_removal_is_masking_in_random_nets(layers: list[tuple[str, int, int]], flat: bool) -> None:
    program = captured_double(random_net(layers, flat), randn(2, 2, 3, 3))
    assert not analyze_axes(program).unruled
    assert_removal_is_masking(program)


# --- refusals, failures, and what follows ------------------------------------------------------------------------------------------------------------


def state(program: Program) -> tuple[str, dict[str, tuple[int, tuple[int, ...]]], list[str]]:
    tensors = {name: (t.data_ptr(), tuple(t.shape)) for name, t in named_tensors(program.graph_module)}
    return program.to_text(), tensors, [str(n.meta.get("val")) for n in program.graph.nodes]


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("head.weight[0]", torch.tensor([0]), "it is pinned (an output of the model)"),
        ("conv1.weight[0]", torch.tensor([], dtype=torch.int64), "at least one of its 8 indices"),
        ("conv1.weight[0]", torch.tensor([1, 1]), "each once, got [1, 1]"),
        ("conv1.weight[0]", torch.tensor([0, 8]), "each once, got [0, 8]"),
        ("conv1.weight[0]", torch.tensor([-1, 2]), "each once, got [-1, 2]"),
        ("conv1.weight[0]", torch.tensor([True, False]), "at least one of its 8 indices"),
        ("conv1.weight[0]", torch.tensor([0.0, 1.0]), "at least one of its 8 indices"),
        ("conv1.weight[0]", torch.tensor([[0, 1]]), "at least one of its 8 indices"),
    ],
)
def test_refusals_leave_the_program_as_it_was(name: str, kept: Tensor, message: str) -> None:
    program = fresh_program("conv")
    analysis = analyze_axes(program)
    before = state(program)
    with pytest.raises(EditError) as caught, Editor(program, "test") as editor:
        editor.resize_axis(analysis, {analysis.class_named(name): kept}, "why")
    assert message in str(caught.value)
    assert state(program) == before
    assert not program.journal.changes


def test_classes_and_analyses_of_another_program_are_refused() -> None:
    program, other = fresh_program("conv"), fresh_program("conv")
    mine, theirs = analyze_axes(program), analyze_axes(other)
    kept, before = torch.tensor([0, 1]), state(program)
    editor = Editor(program, "test")
    with pytest.raises(EditError, match="belongs to another analysis"):
        editor.resize_axis(mine, {theirs.class_named("conv1.weight[0]"): kept}, "why")
    with pytest.raises(EditError, match="made of another program"):
        editor.resize_axis(theirs, {theirs.class_named("conv1.weight[0]"): kept}, "why")
    assert state(program) == before


def test_a_spent_analysis_is_refused() -> None:
    program = fresh_program("grouped")
    analysis = analyze_axes(program)
    one = analysis.class_named("conv1.weight[0].1")
    with Editor(program, "test") as editor:
        editor.resize_axis(analysis, {one: torch.tensor([0, 1, 3])}, "why")
    before = state(program)
    with pytest.raises(EditError, match="since the analysis"):
        Editor(program, "test").resize_axis(analysis, {one: torch.tensor([0, 1])}, "why")
    assert state(program) == before


@pytest.mark.parametrize("model", ["grouped", "gpt2"])
@pytest.mark.parametrize("stage", ["propagate", "_check_shapes", "_rewrite_splits"])
def test_a_failure_midway_leaves_the_program_as_it_was(model: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fresh_program(model)
    analysis = analyze_axes(program)
    before, result = state(program), outputs(program)
    monkeypatch.setattr(fxpress.ir.resize, stage, lambda *_: (_ for _ in ()).throw(EditError("midway")))
    with pytest.raises(EditError, match="midway"), Editor(program, "test") as editor:
        editor.resize_axis(analysis, {c: divided(c)[0] for c in free(analysis)}, "why")
    assert state(program) == before
    program.graph_module.recompile()
    assert difference(outputs(program), result) == 0
    assert not program.journal.changes


@pytest.mark.parametrize("model", some_slow(["conv", "gpt2"], "gpt2"))
def test_a_resized_program_is_saved_loaded_and_exported(model: str, tmp_path: Path) -> None:
    from fxpress.codegen.onnx_target import export_onnx

    program = fresh_program(model)
    small = resized(program, {c.name: divided(c)[0].tolist() for c in free(analyze_axes(program))})
    assert small.parameters < program.parameters
    assert "retyped" in {c.action.value for c in small.journal.changes}
    save(tmp_path / "saved", small)
    loaded = load(tmp_path / "saved").program
    assert difference(outputs(loaded), outputs(small)) == 0
    again = analyze_axes(loaded)
    assert [(c.name, c.size) for c in free(again)] == [(c.name, c.size) for c in free(analyze_axes(small))]
    report = export_onnx(small, tmp_path / "model.onnx")
    assert report.max_error < 1e-4
