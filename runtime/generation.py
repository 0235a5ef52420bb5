"""Text from a language model that runs token by token: greedy or drawn, streamed, until a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CalibrationError

Step = Callable[[Tensor], Tensor]  # new ids [1, n] -> logits [1, n, V]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the most likely one at `temperature` 0, else drawn from the `top_k` (0: all) and the `top_p` of the probability."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise CalibrationError(f"sampling: expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self.temperature}, {self.top_k}, {self.top_p}")

    def chooser(self) -> Callable[[Tensor], int]:
        """`logits [V] -> token`, drawing from a generator of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.temperature == 0:
            return lambda logits: int(logits.argmax())
        return lambda logits: int(torch.multinomial(self.probabilities(logits), 1, generator=generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """`[V]`, zero outside of the top."""
        shares, order = ((logits.double() - logits.max()) / self.temperature).softmax(-1).float().sort(descending=True)
        kept = shares.cumsum(-1) - shares < self.top_p  # the one that passes the sum stays
        if self.top_k:
            kept[self.top_k :] = False
        return torch.zeros_like(shares).scatter(0, order, shares * kept)


def generate(step: Step, prompt: Tensor, *, most: int, sampling: Sampling | None = None, ends: Sequence[int] = ()) -> Iterator[int]:
    """Up to `most` tokens after `prompt: [S] int64`, one by one as they come; a token of `ends` ends the text and is not returned."""
    if prompt.dim() != 1 or len(prompt) == 0:
        raise CalibrationError(f"generate: expected a prompt of at least one token, got {list(prompt.shape)}")
    choose, ids = (sampling or Sampling()).chooser(), prompt
    for _ in range(most):
        token = choose(step(ids.unsqueeze(0))[0, -1])
        if token in ends:
            return
        yield token
        ids = torch.tensor([token])


def stream_text(tokens: Iterator[int], tokenizer: Any, *, stops: Sequence[str] = (), before: Sequence[int] = ()) -> Iterator[str]:
    """Pieces of text as soon as they are certain; what comes from the first of `stops` on is left out.

    `before`: the last tokens of what the text goes on from; some tokenizers drop the space of the very first one.
    """
    if "" in stops:
        raise CalibrationError("generate: a stop string is empty; leave it out")

    def decoded(new: list[int]) -> str:
        return str(tokenizer.decode([*before, *new], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    ids, given, start = list[int](), "", len(decoded([]))
    for token in tokens:
        ids.append(token)
        text = decoded(ids)[start:]
        if (end := _first(text, stops)) is not None:
            yield text[len(given) : end]
            return
        certain = len(text) - max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or certain <= len(given):
            continue  # half of a character, or of a stop string
        yield text[len(given) : certain]
        given = text[:certain]
    rest = decoded(ids)[start + len(given) :]
    if rest:
        yield rest


def _first(text: str, stops: Sequence[str]) -> int | None:
    found = [place for s in stops if (place := text.find(s)) >= 0]
    return min(found, default=None)
