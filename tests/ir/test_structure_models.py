"""Kinds of attention written out by hand: grouped, normalised, cross, fused, parallel, and torch's own modules."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxpress.ir.capture import capture
from fxpress.ir.structure import BlockKind, Role, Structure, find_structure
from tests import attention_models
from tests.tiny import randn

A, F = BlockKind.ATTENTION, BlockKind.FEED_FORWARD


@cache
def structure_of(name: str) -> Structure:
    return find_structure(attention_models.program(name))


def names(*sites: object) -> list[str]:
    return [getattr(s, "name", "") for s in sites]


def roles(structure: Structure) -> dict[str, tuple[Role, int, int | None]]:
    return {c.name: (r, c.size, structure.layer_of(c)) for c, r in structure.roles.items()}


@pytest.mark.parametrize("name", ["qk_norm", "one_key_head", "vision", "vision_eager", "encoder", "encoder_pre"])
def test_two_layers(name: str) -> None:
    structure = structure_of(name)
    assert [(b.layer, b.kind, b.droppable) for b in structure.blocks] == [(0, A, True), (0, F, True), (1, A, True), (1, F, True)]
    assert len(structure.residuals) == 1
    assert [c.size for c in structure.with_role(Role.RESIDUAL)] == [32]
    assert [(f.hidden.size, f.activation, structure.layer_of(f.hidden)) for f in structure.feed_forwards] == [(40, "relu", 0), (40, "relu", 1)]


def test_grouped_queries_with_norms() -> None:
    structure = structure_of("qk_norm")
    for i, found in enumerate(structure.attentions):
        assert names(found.q, found.k, found.v, found.o) == [f"attention.{i}.w{s}" for s in "qkvo"]
        assert (found.num_heads, found.num_kv_heads, found.qk_norm, found.rotary, found.causal, found.cross) == (4, 2, True, True, True, False)
        assert {(r, s) for n, (r, s, layer) in roles(structure).items() if n.startswith(f"attention.{i}.") and layer == i} == {
            (Role.KV_GROUP, 2), (Role.HEAD, 2), (Role.ROPE, 4), (Role.V_DIM, 8),
        }  # fmt: skip


def test_one_key_head() -> None:
    found = structure_of("one_key_head").attentions[0]
    assert (found.num_heads, found.num_kv_heads, found.kv_groups) == (4, 1, None)
    assert found.heads is not None
    assert found.heads is found.group_members
    assert (found.heads.size, structure_of("one_key_head").role_of(found.heads)) == (4, Role.HEAD)
    assert {o.tensor for o in found.heads.occurrences} == {"attention.0.wq.weight", "attention.0.wo.weight"}


@pytest.mark.parametrize("name", ["vision", "vision_eager"])
def test_projection_cut_in_three_equal_parts(name: str) -> None:
    structure = structure_of(name)
    found = structure.attentions[1]
    assert found.fused and names(*found.sites) == ["attention.1.qkv", "attention.1.proj"]
    assert (found.num_heads, found.num_kv_heads, found.causal, found.rotary) == (4, 4, False, False)
    assert found.qk_dims == found.v_dims
    assert found.v_dim is not None and structure.role_of(found.v_dim) is Role.V_DIM


def test_projection_cut_in_unequal_parts_and_fused_gate() -> None:
    structure = structure_of("fused_groups")
    (found,), (network,) = structure.attentions, structure.feed_forwards
    assert found.fused and names(*found.sites) == ["1.qkv", "1.o"]
    assert (found.num_heads, found.num_kv_heads) == (4, 2)
    assert roles(structure) == {
        "0.weight[0]": (Role.RESIDUAL, 32, None), "1.qkv.weight[0].0": (Role.KV_GROUP, 2, 0), "1.qkv.weight[0].1": (Role.HEAD, 2, 0),
        "1.qkv.weight[0].2": (Role.QK_DIM, 8, 0), "1.qkv.weight[0].3": (Role.V_DIM, 8, 0), "1.gate_up.weight[0]": (Role.FFN, 24, 0),
    }  # fmt: skip
    assert network.fused and names(network.gate, network.up, network.down) == ["1.gate_up", "1.gate_up", "1.down"]
    assert network.activation == "silu"


def test_cross_attention() -> None:
    structure = structure_of("cross")
    assert [(b.layer, b.kind) for b in structure.blocks] == [(i, k) for i in (0, 1) for k in (A, A, F)]
    assert [(a.cross, a.causal, a.num_kv_heads) for a in structure.attentions] == [(False, True, 4), (True, False, 2)] * 2
    assert names(*structure.blocks[1].sites) == [f"cross.0.w{s}" for s in "qkvo"], "keys and values belong to the block though they read another stream"


def test_parallel_attention_and_feed_forward_are_one_block() -> None:
    structure = structure_of("parallel")
    assert [(b.layer, b.kind, len(b.attentions), len(b.feed_forwards), len(b.sites)) for b in structure.blocks] == [(0, A, 1, 1, 6), (1, A, 1, 1, 6)]


@pytest.mark.parametrize("name", ["torch", "encoder", "encoder_pre"])
def test_torch_modules(name: str) -> None:
    structure = structure_of(name)
    found = structure.attentions[0]
    assert found.fused and (found.num_heads, found.num_kv_heads) == (4, 4)
    assert [s.shape for s in found.sites] == [(96, 32), (32, 32)]
    assert names(*structure.heads) == ["head" if name == "torch" else "2"]


def test_text_is_one_line_a_thing() -> None:
    text = structure_of("fused_groups").to_text().splitlines()
    assert text[0] == "1 layer, 2 residual blocks, 8 axis classes (6 free)"
    assert "│   ├── attention, 4 heads over 2 key/value heads" in text
    assert "│   │   ├── q, k, v qkv: linear [64, 32]" in text
    assert "│   ├── feed-forward, gated, silu" in text or "│   └── feed-forward, gated, silu" in text
    assert "    ├── gate, up gate_up: linear [48, 32]" in "\n".join(text)
    assert text[-1] == "└── every operator has an axis rule"


class Adapter(nn.Module):
    """A hidden layer with a low-rank pair beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.a, self.b, self.down = nn.Linear(6, 24), nn.Linear(6, 2), nn.Linear(2, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 6]`."""
        return x + self.down(functional.gelu(self.up(x) + self.b(self.a(x))))


class TokenMixer(nn.Module):
    """One block mixes tokens, the other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norms, self.head = nn.Conv2d(3, 16, 4, 4), nn.ModuleList(nn.LayerNorm(16) for _ in range(2)), nn.Linear(16, 5)
        self.tokens = nn.Sequential(nn.Linear(4, 10), nn.GELU(), nn.Linear(10, 4))
        self.channels = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, 8, 8]`."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.norms[1](x))).mean(1))


class Scaled(nn.Module):
    """The stream is scaled before one sum and by the other, and a table is added that depends on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.mix = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        """`[4, 6]`."""
        x = self.embed(x) + self.table
        x = 0.5 * x + self.down(torch.relu(self.up(x)))
        return torch.add(self.mix(x), x, alpha=0.5)


class LongSkip(nn.Module):
    """A block inside the branch of another, and joined features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, 8, 8]`."""
        outer = torch.relu(self.a(x))
        inner = torch.relu(self.b(outer))
        inner = inner + torch.relu(self.c(inner))
        return self.d(torch.cat([functional.interpolate(inner, scale_factor=2.0) + outer, outer], 1))


def captured(model: nn.Module, *shape: int) -> Structure:
    return find_structure(capture(model.eval(), (randn(*shape),)))


def test_a_low_rank_pair_is_no_hidden_layer_and_no_block() -> None:
    structure = captured(Adapter(), 3, 6)
    assert [(b.kind, names(*b.sites)) for b in structure.blocks] == [(F, ["up", "a", "b", "down"])]
    assert [(names(*f.ups), f.hidden.size) for f in structure.feed_forwards] == [(["up", "b"], 24)]


def test_token_mixing_does_not_make_tokens_residual() -> None:
    structure = captured(TokenMixer(), 2, 3, 8, 8)
    assert [(b.kind, b.droppable) for b in structure.blocks] == [(F, True), (F, True)]
    assert [c.size for c in structure.with_role(Role.RESIDUAL)] == [16]
    assert sorted(c.size for c in structure.with_role(Role.FFN)) == [10, 40]


def test_scaled_streams() -> None:
    structure = captured(Scaled(), 4, 6)
    assert [(b.kind, b.droppable) for b in structure.blocks] == [(F, True), (BlockKind.OTHER, False)]
    assert "scales its stream" in structure.blocks[1].why_not
    assert len(structure.residuals) == 1


def test_nested_blocks() -> None:
    structure = captured(LongSkip(), 2, 3, 8, 8)
    assert [(b.kind, names(*b.sites)) for b in structure.blocks] == [(BlockKind.CONVOLUTION, ["c"]), (BlockKind.CONVOLUTION, ["b", "c"])]
    assert not structure.with_role(Role.RESIDUAL)
