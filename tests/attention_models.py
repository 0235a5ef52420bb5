"""Small models with every kind of attention the structure finders must tell apart, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxpress.ir.capture import capture
from fxpress.ir.program import Program

from .tiny import randn

WIDTH, SIZE = 32, 8


class RmsNorm(nn.Module):
    """Root-mean-square norm, spelled out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]`."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions, halves of the last axis paired. `x: [B, H, L, D]`."""
    length, half = x.shape[-2], x.shape[-1] // 2
    angle = torch.arange(length, dtype=x.dtype)[:, None] * 0.1 ** torch.arange(half, dtype=x.dtype)
    angle = torch.cat([angle, angle], -1)
    return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


class Grouped(nn.Module):
    """Grouped queries, rotary, optionally with normalised queries and keys; `memory` gives keys and values in cross attention."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, *, qk_norm: bool = False, rotary: bool = True, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.rotary, self.causal = heads, kv_heads, rotary, causal
        self.wq, self.wo = nn.Linear(WIDTH, heads * SIZE, bias=False), nn.Linear(heads * SIZE, WIDTH, bias=False)
        self.wk, self.wv = nn.Linear(WIDTH, kv_heads * SIZE, bias=False), nn.Linear(WIDTH, kv_heads * SIZE)
        self.norm_q = RmsNorm(SIZE) if qk_norm else nn.Identity()
        self.norm_k = RmsNorm(SIZE) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """`[B, L, WIDTH]`."""
        memory = x if memory is None else memory
        q = self.norm_q(self.wq(x).unflatten(-1, (self.heads, SIZE))).transpose(1, 2)
        k = self.norm_k(self.wk(memory).unflatten(-1, (self.kv_heads, SIZE))).transpose(1, 2)
        v = self.wv(memory).unflatten(-1, (self.kv_heads, SIZE)).transpose(1, 2)
        q, k = (rotated(q), rotated(k)) if self.rotary else (q, k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.wo(y.transpose(1, 2).flatten(2))


class FusedProjection(nn.Module):
    """Vision-style attention: one projection cut as `3 x heads x size`, fused operator or spelled out."""

    def __init__(self, *, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, WIDTH]`."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, c // SIZE, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * SIZE**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v if self.eager else functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class FusedGroups(nn.Module):
    """One projection cut into query heads, key heads and value heads of unequal number, and a fused gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 8 * SIZE), nn.Linear(4 * SIZE, WIDTH)
        self.gate_up, self.down = nn.Linear(WIDTH, 48), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, WIDTH]`."""
        q, k, v = (t.unflatten(-1, (-1, SIZE)).transpose(1, 2) for t in self.qkv(x).split([4 * SIZE, 2 * SIZE, 2 * SIZE], -1))
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(up * functional.silu(gate))


class PreNorm(nn.Module):
    """`x + attention(norm(x))`, then cross attention if there is one, then a feed-forward network, in layers."""

    def __init__(self, attention: list[nn.Module], cross: list[nn.Module] | None = None, *, parallel: bool = False) -> None:
        super().__init__()
        self.parallel = parallel
        self.embed = nn.Linear(6, WIDTH)
        self.attention = nn.ModuleList(attention)
        self.cross = nn.ModuleList(cross or [])
        self.norms = nn.ModuleList(RmsNorm(WIDTH) for _ in range(3 * len(attention)))
        self.networks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH)) for _ in attention)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """`x: [B, L, 6]`, `memory: [B, M, WIDTH]`."""
        x = self.embed(x)
        for i, attention in enumerate(self.attention):
            y = self.norms[3 * i](x)
            if self.parallel:
                x = x + (attention(y) + self.networks[i](y))
                continue
            x = x + attention(y)
            if self.cross:
                x = x + self.cross[i](self.norms[3 * i + 1](x), memory)
            x = x + self.networks[i](self.norms[3 * i + 2](x))
        return self.head(x)


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, 6]`."""
        x = self.embed(x)
        y = self.norm(x)
        return self.head(x + self.attention(y, y, y, need_weights=False)[0])


@dataclass(frozen=True)
class Case:
    """A model and what to capture it with."""

    model: nn.Module
    inputs: tuple[Tensor, ...]


def build(name: str) -> Case:
    """The model called `name`, in double precision, from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _build(name).double().eval()
    memory = (randn(2, 7, WIDTH, seed=1).double(),) if name == "cross" else ()
    return Case(model, (randn(2, 5, 6).double(), *memory))


def _build(name: str) -> nn.Module:
    if name == "torch":
        return TorchAttention()
    if name.startswith("encoder"):
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True, norm_first=name == "encoder_pre")
        return nn.Sequential(nn.Linear(6, WIDTH), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 5))
    if name == "fused_groups":
        return nn.Sequential(nn.Linear(6, WIDTH), FusedGroups(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))
    if name == "cross":
        return PreNorm([Grouped(4, 4, rotary=False), Grouped(4, 4, rotary=False)], [Grouped(rotary=False, causal=False) for _ in range(2)])
    makers: dict[str, Callable[[], nn.Module]] = {
        "qk_norm": lambda: Grouped(qk_norm=True), "one_key_head": lambda: Grouped(kv_heads=1), "parallel": Grouped,
        "vision": FusedProjection, "vision_eager": lambda: FusedProjection(eager=True),
    }  # fmt: skip
    return PreNorm([makers[name](), makers[name]()], parallel=name == "parallel")


def program(name: str) -> Program:
    """The model called `name`, captured."""
    case = build(name)
    return capture(case.model, case.inputs)
