"""Scale pairs: multiplying the producers and dividing the consumers leaves the outputs, one of the two alone does not; and what must not be a pair."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.structure import ScaleKind, ScalePair, Structure, find_structure
from tests import attention_models, tiny
from tests.masking import double, outputs
from tests.tiny import randn, seeded

ZOO = ("mlp", "conv", "depthwise", "grouped", "conv1d", "llama", "gpt2", "opt", "bert", "vit", "resnet", "convnext")
WRITTEN = ("qk_norm", "one_key_head", "fused_groups", "cross", "parallel", "vision", "encoder")


@cache
def found(name: str) -> Structure:
    program = attention_models.program(name) if name in WRITTEN else double(tiny.fresh_program(name))
    return find_structure(program)


def kinds(name: str) -> list[tuple[str, int, list[str]]]:
    return [(p.kind.value, p.size, [s.name for s in p.consumers]) for p in found(name).scale_pairs]


def scaled(program: Program, places: tuple[tuple[str, int], ...], pair: ScalePair, scales: Tensor) -> Program:
    """A clone whose tensors are multiplied along the pair."""
    program = program.clone()
    for name, dim in places:
        tensor = get_tensor(program.graph_module, name)
        index = pair.index(name, dim)
        factors = torch.where(index >= 0, scales[index.clamp(min=0)], 1.0)
        value = tensor.detach() * factors.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
        owner, _, leaf = name.rpartition(".")
        setattr(program.graph_module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return program


def change(program: Program, reference: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(outputs(program), reference, strict=True))


@pytest.mark.parametrize("name", [*ZOO, *WRITTEN])
def test_scales_cancel(name: str) -> None:
    structure = found(name)
    program = structure.analysis.program
    reference = outputs(program)
    assert structure.scale_pairs
    for pair in structure.scale_pairs:
        scales = torch.exp(torch.randn(pair.size, generator=seeded(1), dtype=torch.float64))
        half = scaled(program, pair.producers, pair, scales)
        assert change(half, reference) > 1e-6, f"{pair.producers} alone must matter"
        assert change(scaled(half, pair.inputs, pair, 1 / scales), reference) < 1e-9, pair.producers


def test_pairs_of_a_llama_layer() -> None:
    at = "model.layers.0"
    assert kinds("llama")[:4] == [
        ("norm", 32, [f"{at}.self_attn.{s}_proj" for s in "qkv"]), ("value", 16, [f"{at}.self_attn.o_proj"]),
        ("norm", 32, [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"]), ("linear", 88, [f"{at}.mlp.down_proj"]),
    ]  # fmt: skip
    pairs = found("llama").scale_pairs
    assert pairs[3].producers == ((f"{at}.mlp.up_proj.weight", 0),)
    assert (len(pairs), pairs[-1].consumers[0].name) == (9, "lm_head")
    assert [c.size for c in pairs[1].classes] == [2, 8]


def test_a_fused_projection_scales_only_its_values() -> None:
    pair = next(p for p in found("gpt2").scale_pairs if p.kind is ScaleKind.VALUE)
    index = pair.index(*pair.producers[0])
    assert index[:64].tolist() == [-1] * 64
    assert index[64:].tolist() == list(range(32))
    assert not any(p.kind is ScaleKind.VALUE for p in found("vision").scale_pairs), "its values share their class with queries and keys"


def test_every_query_head_of_a_group_reads_the_same_scales() -> None:
    pair = next(p for p in found("fused_groups").scale_pairs if p.kind is ScaleKind.VALUE)
    assert pair.index(*pair.inputs[0]).tolist() == [8 * g + d for g in range(2) for _ in range(2) for d in range(8)]


def test_curved_activations_and_shared_weights_make_no_pair() -> None:
    assert not [k for k in kinds("vit") if k[0] == "linear"], "gelu"
    assert not [k for k in kinds("gpt2") if k[2] == ["lm_head"]], "lm_head is the embedding"
    assert not [k for k in kinds("bert") if k[0] == "norm"], "post-norm results are also the stream"
    assert not found("repeated").scale_pairs
    assert not found("embedding").scale_pairs


class Twice(nn.Module):
    """Hidden values that also go elsewhere, are multiplied by themselves, or are clamped."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """`[B, 4]`."""
        h = torch.relu(self.up(x))
        if self.kind == "returned":
            return self.down(h), h
        if self.kind == "cut":
            return self.down(torch.cat([h[:, 3:], h[:, :3]], -1))
        return self.down({"squared": h * h, "clamped": h.clamp(max=1.0), "shifted": h + 1, "summed": h + 2 * h}[self.kind])


@pytest.mark.parametrize(("kind", "pairs"), [("returned", 0), ("squared", 0), ("clamped", 0), ("shifted", 0), ("cut", 0), ("summed", 1)])
def test_what_commutes_with_a_scale(kind: str, pairs: int) -> None:
    assert len(find_structure(capture(Twice(kind).eval(), (randn(2, 4),))).scale_pairs) == pairs


def test_norms_and_their_readers() -> None:
    norms = found("llama").norm_linears
    assert [(n.kind, n.weight, len(n.readers), n.exclusive) for n in norms] == [
        ("rms_norm", f"model.layers.{i}.{n}_layernorm.weight", count, True) for i in (0, 1) for n, count in (("input", 3), ("post_attention", 2))
    ] + [("rms_norm", "model.norm.weight", 1, True)]
    assert {(n.kind, n.exclusive, n.bias is not None) for n in found("gpt2").norm_linears} == {("layer_norm", True, True)}
    assert not any(n.exclusive for n in found("bert").norm_linears), "the stream reads them too"


def test_batch_norms_behind_convolutions() -> None:
    pairs = found("resnet").conv_norms
    assert [(p.site.name.removesuffix("convolution"), p.weight) for p in pairs] == [
        (stem, f"{stem}normalization.weight") for p in pairs for stem in [p.site.name.removesuffix("convolution")]
    ]
    assert (len(pairs), pairs[0].eps, pairs[0].result.args[0]) == (6, 1e-5, pairs[0].norm)
    assert [p.mean for p in found("conv").conv_norms] == ["bn1.running_mean", "bn2.running_mean"]
    assert not found("convnext").conv_norms
