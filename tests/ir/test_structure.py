"""The structure of the tiny models: blocks, sites and roles, found without looking at a name."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fxpress.ir.axes import AxisClass
from fxpress.ir.capture import capture
from fxpress.ir.structure import BlockKind, Role, Structure, find_structure
from tests import tiny
from tests.checks import assert_same

LLAMAS = ("llama", "llama_tied", "llama_eager")
LANGUAGE = (*LLAMAS, "opt", "gpt2", "bert")
ENCODERS = (*LANGUAGE, "vit")


@cache
def structure_of(name: str) -> Structure:
    return find_structure(tiny.fresh_program(name))


def names(*sites: object) -> list[str]:
    return [getattr(s, "name", "") for s in sites]


def sizes(structure: Structure, role: Role) -> list[int]:
    return [c.size for c in structure.with_role(role)]


@pytest.mark.parametrize("name", ENCODERS)
def test_transformers_are_layers_of_attention_and_feed_forward(name: str) -> None:
    structure = structure_of(name)
    kinds = [(b.layer, b.kind, b.droppable) for b in structure.blocks]
    assert kinds == [(i, kind, True) for i in (0, 1) for kind in (BlockKind.ATTENTION, BlockKind.FEED_FORWARD)]
    assert [len(layer) for layer in structure.layers] == [2, 2]
    assert len(structure.residuals) == 1
    assert sizes(structure, Role.RESIDUAL) == [32]
    assert all(b.attentions == (a,) for b, a in zip(structure.blocks[::2], structure.attentions, strict=True))
    assert all(b.feed_forwards == (f,) for b, f in zip(structure.blocks[1::2], structure.feed_forwards, strict=True))


@pytest.mark.parametrize("name", LLAMAS)
def test_grouped_queries(name: str) -> None:
    structure = structure_of(name)
    for layer, attention in enumerate(structure.attentions):
        at = f"model.layers.{layer}.self_attn"
        assert names(attention.q, attention.k, attention.v, attention.o) == [f"{at}.{s}_proj" for s in "qkvo"]
        assert (attention.num_heads, attention.num_kv_heads) == (4, 2)
        assert attention.group_members is attention.heads
        for one, role, size in ((attention.heads, Role.HEAD, 2), (attention.kv_groups, Role.KV_GROUP, 2), (attention.v_dim, Role.V_DIM, 8)):
            assert one is not None
            assert (structure.role_of(one), one.size, structure.layer_of(one)) == (role, size, layer)
        assert (attention.rotary, attention.causal, attention.cross, attention.qk_norm, attention.fused) == (True, True, False, False, False)
        assert attention.qk_dim is not None
        assert structure.role_of(attention.qk_dim) is Role.ROPE
        assert structure.layer_of(attention.qk_dim) is None, "one table turns all layers"


@pytest.mark.parametrize("name", LLAMAS)
def test_gated_feed_forward(name: str) -> None:
    structure = structure_of(name)
    for layer, found in enumerate(structure.feed_forwards):
        at = f"model.layers.{layer}.mlp"
        assert names(found.gate, found.up, found.down) == [f"{at}.gate_proj", f"{at}.up_proj", f"{at}.down_proj"]
        assert (found.activation, found.hidden.size, structure.role_of(found.hidden), structure.layer_of(found.hidden)) == ("silu", 88, Role.FFN, layer)
        assert not found.fused


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "vit"])
def test_attention_with_one_key_head_a_query_head(name: str) -> None:
    structure = structure_of(name)
    for layer, attention in enumerate(structure.attentions):
        assert (attention.num_heads, attention.num_kv_heads) == (4, 4)
        assert (attention.kv_groups, attention.group_members) == (None, None)
        for one, role, size in ((attention.heads, Role.HEAD, 4), (attention.qk_dim, Role.QK_DIM, 8), (attention.v_dim, Role.V_DIM, 8)):
            assert one is not None
            assert (structure.role_of(one), one.size, structure.layer_of(one)) == (role, size, layer)
        assert attention.causal == (name in ("opt", "gpt2"))
        assert attention.fused == (name == "gpt2")
        assert not attention.rotary
    assert not structure.with_role(Role.KV_GROUP)


def test_fused_projection() -> None:
    attention = structure_of("gpt2").attentions[1]
    assert names(attention.q, attention.k, attention.v, attention.o) == ["transformer.h.1.attn.c_attn"] * 3 + ["transformer.h.1.attn.c_proj"]
    assert names(*attention.sites) == ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]


@pytest.mark.parametrize(
    ("name", "sites", "hidden", "activation"),
    [
        ("opt", ["model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"], 64, "relu"),
        ("gpt2", ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"], 128, "tanh"),
        ("bert", ["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"], 64, "gelu"),
        ("vit", ["vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2"], 64, "gelu"),
        ("mlp", ["up", "down"], 20, "relu"),
        ("convnext", ["convnext.encoder.stages.0.layers.0.pwconv1", "convnext.encoder.stages.0.layers.0.pwconv2"], 32, "gelu"),
    ],
)
def test_plain_feed_forward(name: str, sites: list[str], hidden: int, activation: str) -> None:
    structure = structure_of(name)
    found = structure.feed_forwards[0]
    assert names(*found.sites) == sites
    assert (found.gate, found.hidden.size, found.activation) == (None, hidden, activation)
    assert structure.role_of(found.hidden) is Role.FFN


def test_channels_of_a_stage_are_one_class() -> None:
    structure = structure_of("resnet")
    assert [b.kind for b in structure.blocks] == [BlockKind.CONVOLUTION] * 2
    assert [b.droppable for b in structure.blocks] == [True, False]
    assert "projection, resnet.encoder.stages.1.layers.0.shortcut.convolution" in structure.blocks[1].why_not
    assert sizes(structure, Role.CONV_OUT) == [8, 8, 16, 16]
    assert [c.size for r in structure.residuals for c in r.classes] == [8, 16]
    assert not structure.with_role(Role.RESIDUAL)


def test_a_stream_that_layer_norms_read_is_residual() -> None:
    structure = structure_of("convnext")
    assert [(b.kind, b.droppable) for b in structure.blocks] == [(BlockKind.CONVOLUTION, True)] * 2
    assert sizes(structure, Role.RESIDUAL) == [8, 16]
    assert sizes(structure, Role.FFN) == [32, 64]


def test_inverted_bottlenecks() -> None:
    structure = structure_of("mobilenet_v2")
    assert [b.kind for b in structure.blocks] == [BlockKind.CONVOLUTION] * 10
    assert all(b.droppable and len(b.sites) == 3 for b in structure.blocks)
    assert [len(r.adds) for r in structure.residuals] == [1, 2, 3, 2, 2]
    assert len({b.path for b in structure.blocks}) == 10


@pytest.mark.parametrize(("name", "channels"), [("conv", [8, 8]), ("depthwise", [8]), ("grouped", [2, 4, 4]), ("conv1d", [6, 4])])
def test_plain_convolutions(name: str, channels: list[int]) -> None:
    structure = structure_of(name)
    assert sizes(structure, Role.CONV_OUT) == channels
    assert (structure.blocks, structure.residuals, structure.attentions, structure.feed_forwards) == ((), (), (), ())


def test_what_has_no_role() -> None:
    def kind(one: AxisClass) -> str:
        return one.pinned[0]

    structure = structure_of("llama")
    assert {kind(c) for c in structure.analysis.classes if structure.role_of(c) is None} == {"rows of embedding are ids", "an output of the model"}
    assert names(*structure.heads) == ["lm_head"]
    assert names(*structure.embeddings) == ["model.embed_tokens"]
    assert not structure_of("repeated").roles
    assert not structure_of("embedding").roles


def test_text_names_pins_and_refusals() -> None:
    lines = [line.strip("│├└─ ") for line in structure_of("resnet").to_text().splitlines()]
    at = "resnet.encoder.stages.1.layers.0"
    assert lines[0] == "2 layers, 2 residual blocks, 16 axis classes (4 free)"
    assert f"convolution; cannot be dropped: its shortcut is a projection, {at}.shortcut.convolution" in lines
    assert f"conv_out, size 16: {at}.shortcut.convolution.weight[0], in 11 tensors" in lines
    assert "no role, size 5: classifier.1.weight[0], in 2 tensors; pinned: an output of the model" in lines
    assert "no role, 10 classes of size 3 to 7; pinned: kernel of ..." in lines


def test_text_lists_operators_without_a_rule() -> None:
    class Sorted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.trapezoid(x, dim=-1) + torch.searchsorted(x[0].contiguous(), x).sum(-1)

    text = find_structure(capture(Sorted(), (tiny.randn(2, 4),))).to_text()
    assert "operators without an axis rule" in text
    assert "aten.searchsorted" in text


@pytest.mark.parametrize("name", [*ENCODERS, "resnet", "convnext", "mobilenet_v2"])
def test_dropping_a_block_is_zeroing_its_branch(name: str) -> None:
    program = structure_of(name).analysis.program
    for block in structure_of(name).blocks:
        if block.droppable:
            dropped, zeroed = program.clone(), program.clone()
            nodes = {n.name: n for n in dropped.graph.nodes}
            nodes[block.node.name].replace_all_uses_with(nodes[block.stream.name])
            nodes = {n.name: n for n in zeroed.graph.nodes}
            with zeroed.graph.inserting_after(nodes[block.branch.name]):
                nothing = zeroed.graph.call_function(torch.ops.aten.mul.Tensor, (nodes[block.branch.name], 0.0))
            nodes[block.node.name].replace_input_with(nodes[block.branch.name], nothing)
            for one in (dropped, zeroed):
                one.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
                one.graph_module.recompile()
            assert not {s.name for s in block.sites} & {s.name for s in dropped.sites()}, "its sites are gone with it"
            assert_same(dropped.run_examples(), zeroed.run_examples())
