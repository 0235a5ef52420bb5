"""Measurements against hand counts, plain formulas and fake clocks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.errors import CalibrationError
from fxpress.ir.program import Program
from fxpress.ir.sites import SiteKind
from fxpress.runtime import language
from fxpress.runtime.attach import attach
from fxpress.runtime.measure import bits_per_weight, compare_logits, greedy_sample, latency, logits_of, measure_size, parity, perplexity

from ..tiny import TinyModel, randn, seeded, tiny, tokens
from .mixed import LANGUAGE, mixed

Captured = Callable[[str], Program]


# Sizes


def test_dense_sizes_are_counted_by_hand(captured: Captured) -> None:
    size = measure_size(captured("mlp"))
    weights = 12 * 20 + 20 * 6
    assert (size.nbytes, size.other_bytes, size.parts) == (4 * (weights + 20), 4 * 20, {"values": 4 * weights})
    assert (size.weights, size.linear_weights, size.bits_per_weight, size.linear_bits_per_weight) == (weights, weights, 32, 32)
    assert json.loads(json.dumps(size.to_dict()))["parts"] == {"values": 4 * weights}


def test_compressed_sizes_count_scales_zero_points_and_padding(captured: Captured) -> None:
    size = measure_size(mixed(captured("mlp"), ("affine{bits=3,group_size=8}",)))
    # A row of up [20, 12]: 36 bits of codes are 5 bytes, 2 scales of 2 bytes, 2 zero points of 3 bits are 1 byte. Of down [6, 20]: 8 bytes, 3 scales, 2 bytes.
    assert size.parts == {"codes": 20 * 5 + 6 * 8, "scale": 20 * 4 + 6 * 6, "zero_point": 20 * 1 + 6 * 2}
    assert size.bits_per_weight == 8 * (20 * 10 + 6 * 16) / 360
    assert size.nbytes == sum(size.parts.values()) + 80


def test_linears_are_told_from_embeddings_and_convs(captured: Captured) -> None:
    program = captured("gpt2")
    with Editor(program, "test") as editor:
        for site in program.sites():
            if site.kind is SiteKind.EMBEDDING:
                editor.compress(site, fmt := _format("affine{bits=8}"), fmt.encode(site.matrix()), "for the test")
    size = measure_size(program)
    assert size.linear_bits_per_weight == 32 > size.bits_per_weight > 8
    assert size.linear_weights == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 96 * 32
    assert bits_per_weight(program, lambda s: s.kind is SiteKind.EMBEDDING) == 8 * (96 + 64) * (32 + 2 + 1) / ((96 + 64) * 32)
    assert math.isnan(bits_per_weight(program, lambda s: s.kind is SiteKind.CONV2D))
    assert measure_size(captured("conv")).weights == 8 * 27 + 8 * 72 + 40


def _format(spec: str) -> Any:
    from fxpress.ir.formats.base import parse_format

    return parse_format(spec)


def test_tied_weights_count_once_until_they_are_compressed_apart(captured: Captured) -> None:
    tied, apart = measure_size(captured("llama_tied")), measure_size(captured("llama"))
    assert apart.weights - tied.weights == 96 * 32
    assert apart.nbytes - tied.nbytes == 4 * 96 * 32
    assert tied.linear_weights == apart.linear_weights
    alike = measure_size(mixed(captured("llama_tied"), ("affine{bits=8}",)))
    other = measure_size(mixed(captured("llama_tied"), ("affine{bits=8}", "affine{bits=4}")))
    assert alike.weights == tied.weights and other.weights == apart.weights


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "conv", "opt"])
def test_parts_and_the_rest_add_up(captured: Captured, name: str) -> None:
    program = mixed(captured(name))
    size = measure_size(program)
    assert sum(size.parts.values()) == sum(s.nbytes for s in program.sites())
    assert size.nbytes == program.nbytes == size.other_bytes + sum(size.parts.values())


# Parity


def test_parity_is_zero_for_a_clone_and_the_difference_else(captured: Captured) -> None:
    program = captured("mlp")
    same = parity(program, program.clone())
    assert (same.max_abs_error, same.max_rel_error, same.elements) == (0.0, 0.0, 24)
    other = mixed(program)
    batches = [randn(3, 12, seed=s) for s in range(3)]
    a, b = torch.cat([program.run(x) for x in batches]).double(), torch.cat([other.run(x) for x in batches]).double()
    got = parity(program, other, batches)
    assert got.max_abs_error == float((a - b).abs().max()) > 0
    assert got.max_rel_error == max(float((program.run(x).double() - other.run(x).double()).abs().max() / program.run(x).abs().max()) for x in batches)
    assert got.elements == 54


class Fixed(nn.Module):
    """Returns what it is told."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.values, x.new_ones(2)  # type: ignore[operator]


def fixed(*values: float) -> Program:
    program = capture(Fixed([0.0] * len(values)), (torch.zeros(len(values)),))
    program.graph_module.register_buffer("values", torch.tensor(values))
    return program


@pytest.mark.parametrize(
    ("a", "b", "absolute", "relative"),
    [((1.0, -4.0), (1.5, -4.0), 0.5, 0.125),
     ((math.nan, 1.0), (math.nan, 1.0), 0.0, 0.0), ((math.inf, 1.0), (math.inf, 1.0), 0.0, 0.0),
     ((math.nan, 1.0), (2.0, 1.0), math.inf, math.inf), ((math.inf, 1.0), (-math.inf, 1.0), math.inf, math.inf),
     ((1.0, 1.0), (math.nan, 1.0), math.inf, math.inf),
     ((0.0, 0.0), (0.0, 1.0), 1.0, math.inf)],
)  # fmt: skip
def test_parity_of_values_that_are_not_finite(a: tuple[float, float], b: tuple[float, float], absolute: float, relative: float) -> None:
    got = parity(fixed(*a), fixed(*b))
    assert (got.max_abs_error, got.max_rel_error) == (absolute, relative)


def test_parity_refuses_what_it_cannot_compare(captured: Captured) -> None:
    with pytest.raises(CalibrationError, match=r"outputs differ in shape: expected \[\[2\], \[2\]\], got \[\[3\], \[2\]\]"):
        parity(fixed(1.0, 2.0), _takes_two(fixed(1.0, 2.0, 3.0)))
    with pytest.raises(CalibrationError, match="empty"):
        parity(captured("mlp"), captured("mlp"), [])
    with pytest.raises(CalibrationError, match=r"batch 0.*expected shape \[\*, 12\]"):
        parity(captured("mlp"), captured("mlp"), [randn(2, 5)])


def _takes_two(program: Program) -> Any:
    return SimpleNamespace(run_inputs=lambda call: program.run_examples())


# Latency


class Clock:
    """Time that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += next(seconds)

        return call


def forever(*values: float) -> Iterator[float]:
    while True:
        yield from values


def test_latency_takes_medians_and_ratios_within_rounds() -> None:
    clock = Clock()
    got = latency({"a": clock.work("a", forever(1.0, 2.0, 3.0)), "b": clock.work("b", forever(2.0, 4.0, 6.0))}, rounds=9, warmup=3, clock=clock)
    assert (got["a"].seconds.median, got["b"].seconds.median, got.rounds) == (2.0, 4.0, 9)
    assert (got["b"].ratio.median, got["b"].ratio.low, got["b"].ratio.high) == (2.0, 2.0, 2.0)  # although seconds vary threefold
    assert (got["a"].ratio.median, got["b"].seconds.low, got["b"].seconds.high) == (1.0, 2.0, 6.0)
    assert str(got["b"].seconds) == "4 (2 to 6)"
    assert json.loads(json.dumps(got.to_dict()))["timings"][1]["name"] == "b"


def test_latency_interleaves_warms_up_and_changes_who_is_first() -> None:
    clock = Clock()
    slow_start = iter([100.0, 100.0, *[1.0] * 4])
    got = latency({"a": clock.work("a", slow_start), "b": clock.work("b", forever(1.0))}, rounds=4, warmup=2, clock=clock)
    assert "".join(clock.calls) == "ab" + "ba" + "ab" + "ba" + "ab" + "ba"
    assert got["a"].seconds.high == 1.0


def test_latency_waits_for_the_device() -> None:
    clock = Clock()
    pending = [0.0]

    def finish() -> None:
        clock.now += pending.pop()
        pending.append(0.0)

    def launch() -> None:
        pending[0] = 5.0

    assert latency({"kernel": launch}, rounds=3, warmup=0, synchronize=finish, clock=clock)["kernel"].seconds.median == 5.0
    with pytest.raises(CalibrationError, match="at least one callable"):
        latency({})
    with pytest.raises(CalibrationError, match="one round"):
        latency({"a": launch}, rounds=0)


# Language models


def table(seed: int, vocabulary: int = 11, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """A bigram model: the logits of the next token depend on the last one."""
    rows = 3 * torch.randn(vocabulary, vocabulary, generator=seeded(seed))
    return lambda ids: rows[ids].to(dtype)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), count=st.integers(1, 5), length=st.integers(2, 9), batch=st.integers(1, 6), chunk=st.sampled_from([1, 11, 30, 1 << 20]))
def test_perplexity_and_comparison_follow_their_formulas(seed: int, count: int, length: int, batch: int, chunk: int) -> None:
    windows = torch.randint(11, (count, length), generator=seeded(seed))
    a, b = table(seed), table(seed + 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "CHUNK", chunk)
        got, compared = perplexity(a, windows, batch=batch), compare_logits(a, b, windows, batch=batch)
    p, q = (m(windows).double().softmax(-1) for m in (a, b))
    nll = -p[:, :-1].gather(-1, windows[:, 1:, None]).log().mean()
    assert got.tokens == count * (length - 1)
    assert got.nll == pytest.approx(float(nll), abs=1e-9) and got.perplexity == pytest.approx(math.exp(float(nll)))
    assert compared.tokens == count * length
    assert compared.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-9)
    assert compared.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    got = perplexity(lambda ids: torch.zeros(*ids.shape, 37, dtype=torch.bfloat16), tokens(3, 8, 37), batch=2)
    assert got.perplexity == pytest.approx(37.0, rel=1e-12)


def test_a_model_agrees_with_itself_even_where_tokens_are_masked() -> None:
    def masked(ids: Tensor) -> Tensor:
        return table(1)(ids).index_fill(-1, torch.tensor([3]), -math.inf)

    same = compare_logits(masked, masked, tokens(2, 6, 11))
    assert (same.kl, same.top1_agreement) == (0.0, 1.0)
    assert compare_logits(table(1), masked, tokens(2, 6, 11)).kl == math.inf
    assert perplexity(masked, torch.full((1, 4), 3)).perplexity == math.inf
    assert math.isnan(perplexity(lambda ids: table(1)(ids) * math.nan, tokens(2, 6, 11)).perplexity)


def test_no_second_copy_of_the_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    double = Tensor.double

    def watched(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return double(tensor)

    monkeypatch.setattr(Tensor, "double", watched)
    monkeypatch.setattr(language, "CHUNK", 1000)
    windows = tokens(2, 400, 100)
    perplexity(table(0, 100), windows, batch=2)
    compare_logits(table(0, 100), table(1, 100), windows, batch=2)
    assert held and max(held) <= 1000


def test_sums_are_exact_over_many_tokens() -> None:
    """In float32 a running sum of 2 million such values would be off in the fourth digit."""
    windows = torch.zeros(4, 500_001, dtype=torch.int64)
    got = perplexity(lambda ids: torch.tensor([0.0, -2.0]).expand(*ids.shape, 2), windows)
    assert got.nll == pytest.approx(math.log1p(math.exp(-2)), rel=1e-12)


@pytest.mark.parametrize(
    "windows", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(2, 4)]
)
def test_windows_of_the_wrong_shape_are_refused(windows: Tensor) -> None:
    for call in (lambda: perplexity(table(0), windows), lambda: compare_logits(table(0), table(0), windows)):
        with pytest.raises(CalibrationError, match=r"expected token ids \[count >= 1, length >= 2\]"):
            call()


@pytest.mark.parametrize("output", [torch.zeros(2, 4), torch.zeros(2, 3, 11), (torch.zeros(2, 4, 11),), None])
def test_logits_of_the_wrong_shape_are_refused(output: Any) -> None:
    with pytest.raises(CalibrationError, match=r"logits: expected \[2, 4, V\]"):
        perplexity(lambda ids: output, tokens(2, 4, 11), batch=2)


@pytest.mark.parametrize("name", LANGUAGE)
def test_programs_modules_and_attached_models_give_the_same_logits(captured: Captured, name: str) -> None:
    zoo, program = tiny(name), captured(name)
    ids = tokens(3, 7)
    expected = program.run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert expected.shape == (3, 7, 96)
    for model in (program, zoo.model, program.graph_module, attach(zoo.model, program, program), lambda i: zoo.model(i, use_cache=False)):
        assert torch.equal(logits_of(model)(ids), expected)
    compressed = mixed(program)
    assert compare_logits(logits_of(program), logits_of(zoo.model), ids).kl == 0.0
    assert compare_logits(logits_of(program), logits_of(compressed), ids).kl > 0
    assert perplexity(logits_of(program), ids, batch=2).perplexity > 1


def test_programs_with_constants_and_positions_are_called_right() -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    model, ids = BertForMaskedLM(config).eval(), tokens(2, 6, 30)
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(6).expand(2, 6), "return_dict": False}
    program = capture(model, inputs)
    assert torch.equal(logits_of(program)(ids), model(ids).logits)
    with pytest.raises(CalibrationError, match=r"does not take ids \[2, 5\].*expected shape \[2, 6\]"):
        logits_of(program)(ids[:, :5])
    positional = capture(tiny("embedding").model, tiny("embedding").example_inputs)
    assert torch.equal(logits_of(positional)(tokens(2, 6, 24)), positional.run(tokens(2, 6, 24)))


class Needy(nn.Module):
    """A model with an input that token ids do not give."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor, prompt: Tensor) -> dict[str, Any]:
        return {"loss": None, "logits": self.embed(input_ids) + prompt}


def test_what_cannot_be_filled_or_found_is_refused() -> None:
    program = capture(Needy(), (tokens(1, 4, 11), randn(11)))
    with pytest.raises(CalibrationError, match=r"cannot make the input prompt \[11\] from token ids"):
        logits_of(program)(tokens(1, 4, 11))
    needy = Needy()
    assert torch.equal(logits_of(lambda ids: needy(ids, 1.0))(tokens(1, 4, 11)), needy(tokens(1, 4, 11), 1.0)["logits"])
    with pytest.raises(CalibrationError, match="returned NoneType without a tensor"):
        logits_of(lambda ids: None)(tokens(1, 4, 11))


def test_greedy_continuation_equals_generate(captured: Captured) -> None:
    zoo: TinyModel = tiny("llama")
    ids = tokens(2, 4)
    expected = zoo.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    assert torch.equal(greedy_sample(logits_of(captured("llama")), ids, 5), expected)
    assert torch.equal(greedy_sample(table(0), tokens(1, 3, 11), 0), tokens(1, 3, 11))
