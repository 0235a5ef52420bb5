"""Choosing tokens and streaming text: what may be drawn, when pieces are certain, where a text ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.ir.errors import CalibrationError
from fxpress.runtime.generation import Sampling, generate, stream_text

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0]).log_softmax(-1)


def counting(ids: Tensor) -> Tensor:
    """The next token is the last one plus one."""
    return torch.nn.functional.one_hot((ids + 1) % 10, 10).float()


class Letters:
    """Token i is the text `words[i]`."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(self.words[i] for i in ids)


def test_greedy_is_the_most_likely() -> None:
    assert Sampling().chooser()(LOGITS) == 1


@pytest.mark.parametrize(("options", "kept"), [({"top_k": 2}, {1, 3}), ({"top_p": 0.5}, {1}), ({"top_p": 0.9}, {1, 3, 2}), ({}, {0, 1, 2, 3})])
def test_only_the_top_is_drawn(options: dict[str, float], kept: set[int]) -> None:
    chances = Sampling(temperature=1.0, **options).probabilities(LOGITS)  # type: ignore[arg-type]
    assert set(chances.nonzero().flatten().tolist()) == kept
    torch.testing.assert_close(chances[list(kept)] / chances.sum(), LOGITS.exp()[list(kept)] / LOGITS.exp()[list(kept)].sum())
    drawn = Sampling(temperature=1.0, **options).chooser()  # type: ignore[arg-type]
    assert {drawn(LOGITS) for _ in range(300)} <= kept


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 5), st.integers(0, 6), st.floats(0.01, 1))
def test_something_can_always_be_drawn(temperature: float, top_k: int, top_p: float) -> None:
    assert float(Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(LOGITS).sum()) > 0


def test_draws_follow_the_seed() -> None:
    def text(seed: int) -> list[int]:
        return list(generate(lambda ids: LOGITS.expand(1, ids.shape[1], -1), torch.tensor([0]), most=20, sampling=Sampling(temperature=2.0, seed=seed)))

    assert text(1) == text(1) != text(2)


def test_tokens_come_until_an_end() -> None:
    assert list(generate(counting, torch.tensor([5, 2]), most=4)) == [3, 4, 5, 6]
    assert list(generate(counting, torch.tensor([2]), most=9, ends=(5,))) == [3, 4]


def test_the_prompt_goes_in_once_and_tokens_after_it_alone() -> None:
    seen: list[int] = []
    list(generate(lambda ids: (seen.append(ids.shape[1]), counting(ids))[1], torch.tensor([1, 2, 3]), most=3))  # type: ignore[func-returns-value]
    assert seen == [3, 1, 1]


def test_what_is_refused() -> None:
    with pytest.raises(CalibrationError, match="expected a prompt of at least one token"):
        list(generate(counting, torch.zeros(0, dtype=torch.int64), most=1))
    for options in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}):
        with pytest.raises(CalibrationError, match="expected temperature >= 0, top_k >= 0"):
            Sampling(**options)


@pytest.mark.parametrize(
    ("stops", "pieces"),
    [((), ["Hel", "lo", " wor", "ld"]), (("wo",), ["Hel", "lo", " "]), (("lo w",), ["He", "l"]), (("x",), ["Hel", "lo", " wor", "ld"]), (("Hel",), [""])],
)
def test_text_stops_before_a_stop_string_wherever_tokens_cut_it(stops: tuple[str, ...], pieces: list[str]) -> None:
    found = list(stream_text(iter([0, 1, 2, 3]), Letters("Hel", "lo", " wor", "ld"), stops=stops))
    assert "".join(found) == "".join(pieces)
    assert not stops or not any(s in "".join(found) for s in stops)


def test_the_space_between_prompt_and_text_stays() -> None:
    class Pieces(Letters):
        """As SentencePiece has it: the very first space is none."""

        def decode(self, ids: list[int], **options: bool) -> str:
            return super().decode(ids, **options).removeprefix(" ")

    words = Pieces(" hello", " world", "s")
    assert list(stream_text(iter([1, 2, 0]), words, before=[0])) == [" world", "s", " hello"]
    assert not next(stream_text(iter([1, 2]), words, before=[0], stops=(" world",)))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(CalibrationError, match="a stop string is empty"):
        list(stream_text(iter([0]), Letters("a"), stops=("a", "")))


def test_half_a_stop_string_at_the_end_is_text() -> None:
    assert "".join(stream_text(iter([0, 1]), Letters("a", "b"), stops=("bc",))) == "ab"


def test_characters_come_whole() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: bool) -> str:
            return bytes(ids).decode(errors="replace")

    ids = list("né€".encode())
    assert list(stream_text(iter(ids), Bytes())) == ["n", "é", "€"]
