"""Speculative decoding: a smaller model drafts, the full one checks, and the text is the full one's own greedy text, token by token.

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv 2211.17192), for greedy decoding; with a prefix of a nested model
as the draft, MatFormer (arXiv 2310.07707, appendix C.1), which needs no weight beside the full model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.errors import CalibrationError
from .decoding import Decoder
from .language import Logits


@dataclass(frozen=True)
class Speculation:
    """The text `ids: [1, S + new] int64`, how many drafted tokens every check took, and how often each model ran."""

    ids: Tensor
    accepted: tuple[int, ...]
    full_runs: int
    draft_runs: int

    @property
    def mean_accepted(self) -> float:
        """Drafted tokens taken a check."""
        return sum(self.accepted) / max(1, len(self.accepted))

    @property
    def tokens_per_run(self) -> float:
        """New tokens for one run of the full model over the text's end; plain decoding makes one."""
        return (sum(self.accepted) + len(self.accepted)) / max(1, len(self.accepted))


def speculate(full: Logits, draft: Logits, ids: Tensor, new_tokens: int, *, ahead: int = 4) -> Speculation:
    """Continue `ids: [1, S] int64` by `new_tokens` of the full model's most likely tokens; the draft goes `ahead` of it, the whole text is run each time.

    A check runs the full model once over text and draft. Drafted tokens are taken as long as they are the full model's own choice, and the first that is not
    is replaced by that choice, so every check makes at least one token.
    """
    _check(ids, new_tokens, ahead)
    text, accepted, draft_runs = ids, list[int](), 0
    while (left := ids.shape[1] + new_tokens - text.shape[1]) > 0:
        guess = text
        for _ in range(min(ahead, left - 1)):
            guess = torch.cat([guess, _choice(draft, guess)[:, -1:]], 1)
            draft_runs += 1
        own = _choice(full, guess)[:, text.shape[1] - 1 :]  # after the text, and after every drafted token
        drafted = guess[:, text.shape[1] :]
        accepted.append(_agreed(own, drafted))
        text = torch.cat([text, own[:, : accepted[-1] + 1]], 1)
    return Speculation(text, tuple(accepted), len(accepted), draft_runs)


def speculate_cached(full: Decoder, draft: Decoder, ids: Tensor, new_tokens: int, *, ahead: int = 4) -> Speculation:
    """As `speculate`, token by token over one cache that both models share: the draft reads the full model's keys and values and writes its own behind them.

    A check writes the full model's over the draft's, so nothing of the draft stays, and the draft never runs over the prompt. Both models need caches of
    the same sizes, which prefixes of feed-forward layers have (`Elastic`). The run over the prompt counts as one of the full model's.
    """
    _check(ids, new_tokens, ahead)
    full.start()
    text, accepted, draft_runs = torch.cat([ids, _choice(full, ids)[:, -1:]], 1), list[int](), 0
    while (left := ids.shape[1] + new_tokens - text.shape[1]) > 0:
        held, guess = full.length, text[:, -1:]
        draft.follow(full)
        for _ in range(min(ahead, left - 1)):
            guess = torch.cat([guess, _choice(draft, guess[:, -1:])], 1)
            draft_runs += 1
        own = _choice(full, guess)
        accepted.append(_agreed(own, guess[:, 1:]))
        full.rewind(held + accepted[-1] + 1)
        text = torch.cat([text, own[:, : accepted[-1] + 1]], 1)
    return Speculation(text, tuple(accepted), len(accepted) + 1, draft_runs)


def _check(ids: Tensor, new_tokens: int, ahead: int) -> None:
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1 or new_tokens < 1 or ahead < 1:
        raise CalibrationError(f"speculate: expected ids [1, S >= 1] and counts of at least 1, got {list(ids.shape)}, new_tokens={new_tokens}, ahead={ahead}")


def _agreed(own: Tensor, drafted: Tensor) -> int:
    """Drafted tokens `[1, n]` before the first that is not the full model's own choice `[1, n + 1]`."""
    return int((own[:, : drafted.shape[1]] == drafted).long().cumprod(1).sum())


def _choice(model: Logits, ids: Tensor) -> Tensor:
    """The most likely next token after every position, `[1, S] int64`."""
    with torch.no_grad():
        logits = model(ids)
    if logits.shape[1] != ids.shape[1]:
        raise CalibrationError(f"speculate: {ids.shape[1]} tokens went in and logits of {logits.shape[1]} came out; save the model with all_logits=True")
    return logits.argmax(-1).to(ids)
