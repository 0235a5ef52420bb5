"""Attention over caches as one operator: what it computes, where it is found, and where not and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from fxpress.ir.cached_attention import cached_attention, fuse_cached_attentions
from fxpress.ir.edit import Editor
from fxpress.ir.nodes import op_name
from fxpress.ir.program import Program

from ..runtime.test_causal_lm import batch, captured, in_parts
from ..tiny import fresh_program, randn

FUSED = "fxpress.cached_attention"


def fused(name: str, **options: int) -> tuple[Program, dict[str, str]]:
    program = captured(name).clone()
    with Editor(program, "test") as editor:
        left = fuse_cached_attentions(editor, **options)
    return program, left


def operators(program: Program) -> list[str]:
    return [op_name(n) for n in program.graph.nodes]


def attentions(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if op_name(n) == FUSED]


@pytest.mark.parametrize("rotary", [False, True])
def test_the_operator_is_attention_in_float64(rotary: bool) -> None:
    heads, groups, width, past, new = 4, 2, 6, 3, 5
    query, key, value = (randn(2, new, count * width, seed=i).double() for i, count in enumerate((heads, groups, groups)))
    held = [randn(2, groups, past, width, seed=i).double() for i in (7, 8)]
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past).expand(2, 1, -1, -1)
    angles = torch.arange(past + new).double()[:, None] * torch.tensor([1.0, 0.3, 0.01]).double()
    tables = (angles.cos(), angles.sin()) if rotary else (None, None)
    found, keys, values = cached_attention(query, key, value, *held, mask, *tables, None, None, heads, groups, 0.4)

    def split(x: Tensor, count: int) -> Tensor:
        return x.view(2, new, count, width).transpose(1, 2)

    def turn(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles[past:]), angles[past:])
        return torch.cat([pairs.real, pairs.imag], -1)

    q, k = split(query, heads), split(key, groups)
    q, k = (turn(q), turn(k)) if rotary else (q, k)
    torch.testing.assert_close(keys, torch.cat([held[0], k], 2))
    torch.testing.assert_close(values, torch.cat([held[1], split(value, groups)], 2))
    scores = torch.einsum("bgmqd,bgkd->bgmqk", q.view(2, groups, 2, new, width), keys) * 0.4
    shares = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
    expected = torch.einsum("bgmqk,bgkd->bgmqd", shares, values).flatten(1, 2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected)


def test_its_shapes_without_data_are_those_with() -> None:
    shapes = ((2, 5, 24), (2, 5, 12), (2, 5, 12), (2, 2, 3, 6), (2, 2, 3, 6))
    mask = torch.ones(2, 1, 5, 8, dtype=torch.bool)
    real = cached_attention(*(randn(*s) for s in shapes), mask, None, None, None, None, 4, 2, 1.0)
    empty = cached_attention(*(torch.empty(s, device="meta") for s in shapes), mask.to("meta"), None, None, None, None, 4, 2, 1.0)
    assert [t.shape for t in real] == [t.shape for t in empty]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_every_family_becomes_the_operator_and_computes_what_it_did(name: str) -> None:
    program, left = fused(name)
    assert not left and len(attentions(program)) == 2
    assert "aten.scaled_dot_product_attention" not in operators(program) and "aten.expand.default" not in operators(program)
    call = batch(2, 9)
    for cuts in ((), (5,), (5, 6, 7)):
        torch.testing.assert_close(in_parts(program.run, call, *cuts), in_parts(captured(name).run, call, *cuts), rtol=1e-5, atol=1e-6)


def test_rotary_tables_go_in_by_position_once() -> None:
    program, _ = fused("llama")
    first, second = attentions(program)
    assert first.args[6:8] == second.args[6:8] or [n.target for n in first.args[6:8]] == [n.target for n in second.args[6:8]]  # type: ignore[union-attr]
    assert first.args[6].meta["val"].shape == (64, 4) and "aten.cos" not in operators(program)  # type: ignore[union-attr]
    kept, _ = fused("llama", rotary_multiple=16)
    assert all(n.args[6] is None for n in attentions(kept)) and "aten.cos" in operators(kept)
    call = batch(2, 9)
    torch.testing.assert_close(in_parts(kept.run, call, 5), in_parts(captured("llama").run, call, 5), rtol=1e-5, atol=1e-6)


def test_attention_without_a_cache_stays() -> None:
    program = fresh_program("llama")
    with Editor(program, "test") as editor:
        left = fuse_cached_attentions(editor)
    assert set(left.values()) == {"its keys and values are no grown cache of the program"} and not attentions(program)


def test_heads_of_unequal_widths_stay() -> None:
    import fxpress

    program = fxpress.optimize(captured("llama"), "decompose_modules{ratio=0.7}", calibration=[batch(2, 16)]).program.clone()
    widths = {v.shape[-1] for v in program.inputs.cached}
    assert len(widths) > 1, "the test is about unequal widths"
    with Editor(program, "test") as editor:
        left = fuse_cached_attentions(editor)
    assert any("its heads are of widths" in why for why in left.values())


def test_in_8_bits_it_attends_to_what_is_held() -> None:
    shapes = ((2, 5, 24), (2, 5, 12), (2, 5, 12))
    query, key, value = (randn(*s, seed=i).double() for i, s in enumerate(shapes))
    held = [torch.randint(-128, 128, (2, 2, 3, 6)).to(torch.int8) for _ in range(2)]
    units = [torch.rand(1, 2, 1, 6).double() / 50 + 0.01 for _ in range(2)]
    mask = torch.ones(5, 8, dtype=torch.bool).tril(3).expand(2, 1, -1, -1)
    found, *caches = cached_attention(query, key, value, *held, mask, None, None, *units, 4, 2, 0.4)
    new = [(x.view(2, 5, 2, 6).transpose(1, 2) / u).round().clamp(-128, 127) for x, u in zip((key, value), units, strict=True)]
    for cache, past, mine in zip(caches, held, new, strict=True):
        assert cache.dtype is torch.int8 and torch.equal(cache.double(), torch.cat([past.double(), mine], 2))
    wide = [torch.cat([past * u, mine * u], 2) for past, mine, u in zip(held, new, units, strict=True)]
    floats = [w[:, :, 3:].transpose(1, 2).flatten(2) for w in wide]
    expected = cached_attention(query, *floats, *(w[:, :, :3] for w in wide), mask, None, None, None, None, 4, 2, 0.4)[0]
    torch.testing.assert_close(found, expected)
