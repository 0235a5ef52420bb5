"""Axis classes of whole programs: names, sizes, occurrences, pins; unknown operators pin what they touch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxpress.ir.axes import AxisAnalysis, analyze_axes
from fxpress.ir.capture import capture
from fxpress.ir.text import program_text

from ..masking import free
from ..tiny import fresh_program, randn


@torch.library.custom_op("fxpress_tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    """An operator without a rule."""
    return x.flip(-1)


@unknown.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unknown(nn.Module):
    """Two outputs; a class before the unknown operator and one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.d(unknown(self.c(self.b(y)))), y.mean(-1)


def lines(analysis: AxisAnalysis) -> list[str]:
    return [line for line in analysis.to_text().splitlines() if " pinned: " not in line]


def test_grouped_convolutions() -> None:
    vectors = ("bn1.weight", "bn1.bias")
    found = lines(analyze_axes(fresh_program("grouped")))
    assert [line.split(":")[0] for line in found] == ["conv1.weight[0].0 (2)", "conv1.weight[0].1 (4)", "conv2.weight[0].1 (4)"]
    assert found[1] == "conv1.weight[0].1 (4): conv1.weight[0]*2, " + "".join(f"{v}[0]*2, " for v in vectors) + (
        "conv2.weight[1], bn1.running_mean[0]*2, bn1.running_var[0]*2"
    )
    assert "head.weight[1]*4" in found[0]


def test_depthwise_convolutions_join_their_channels() -> None:
    (found,) = lines(analyze_axes(fresh_program("depthwise")))
    assert found == (
        "conv1.weight[0] (8): conv1.weight[0], bn1.weight[0], bn1.bias[0], conv2.weight[0], conv2.bias[0], bn2.weight[0], bn2.bias[0], head.weight[1], "
        "bn1.running_mean[0], bn1.running_var[0], bn2.running_mean[0], bn2.running_var[0]"
    )


def test_llama_heads_groups_and_tied_weights() -> None:
    found = lines(analyze_axes(fresh_program("llama")))
    q, k, v, o = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkvo")
    assert f"{q}[0].0 (2): {q}[0]*16, {k}[0]*8, {v}[0]*8, {o}[1]*16" in found
    assert f"{q}[0].1 (2): {q}[0]*16, {o}[1]*16" in found
    assert f"{v}[0].1 (8): {v}[0]*2, {o}[1]*4" in found
    tied = analyze_axes(fresh_program("llama_tied"))
    assert len([c for c in tied.classes if any(o.tensor in ("lm_head.weight", "model.embed_tokens.weight") for o in c.occurrences)]) == 2


def test_gpt2_fused_qkv_is_three_parts_of_heads_times_features() -> None:
    found = lines(analyze_axes(fresh_program("gpt2")))
    fused, bias, out = (f"transformer.h.0.attn.{n}" for n in ("c_attn.weight", "c_attn.bias", "c_proj.weight"))
    assert f"{fused}[1].0 (4): {fused}[1]*24, {bias}[0]*24, {out}[0]*8" in found
    assert f"{fused}[1].1 (8): {fused}[1]*8, {bias}[0]*8" in found
    assert f"{fused}[1].2 (8): {fused}[1]*4, {bias}[0]*4, {out}[0]*4" in found


def test_pinned_reasons() -> None:
    reasons = {c.name: c.pinned for c in analyze_axes(fresh_program("conv")).classes}
    assert reasons["conv1.weight[1]"][0] == "an input of the model"
    assert reasons["conv1.weight[2]"][0] == "kernel of conv2d"
    assert reasons["head.weight[0]"][0] == "an output of the model"
    assert reasons["conv1.weight[0]"] == ()


def test_an_unknown_operator_pins_what_it_touches_and_is_listed() -> None:
    analysis = analyze_axes(capture(Unknown(), (randn(2, 3),)))
    assert [why for _, why in analysis.unruled] == ["no axis rule"]
    assert "no rule: fxpress_tests.unknown at unknown: no axis rule" in analysis.to_text()
    assert [(c.name, bool(c.reductions)) for c in free(analysis)] == [("a.weight[0]", True), ("b.weight[0]", False)]
    for name in ("c.weight[0]", "d.weight[1]"):
        assert analysis.class_named(name).pinned == ("no axis rule: fxpress_tests.unknown at unknown",)


def test_a_program_without_values_gets_them() -> None:
    program, other = fresh_program("resnet"), fresh_program("resnet")
    text = program_text(other)
    for node in other.graph.nodes:
        node.meta.pop("val", None)
    assert analyze_axes(other).to_text() == analyze_axes(program).to_text()
    assert program_text(other) == text


def test_counts_of_parameters_and_multiplications() -> None:
    program = fresh_program("mlp")
    analysis = analyze_axes(program)
    choice = {analysis.class_named("up.weight[0]").atom: torch.arange(5)}
    assert (analysis.parameters(), analysis.macs()) == (program.parameters, 4 * (12 * 20 + 20 * 6))
    assert (analysis.parameters(choice), analysis.macs(choice)) == (12 * 5 + 5 + 5 * 6, 4 * (12 * 5 + 5 * 6))
