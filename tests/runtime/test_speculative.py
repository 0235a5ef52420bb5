"""Speculative decoding: the full model's own text whatever the draft, counts that add up, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.ir.errors import CalibrationError
from fxpress.runtime.elastic import Elastic
from fxpress.runtime.language import greedy_sample, logits_of
from fxpress.runtime.speculative import speculate

from ..passes.nesting.nets import nested
from ..tiny import tokens


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_the_text_is_the_full_model_s(name: str, ahead: int) -> None:
    program, _ = nested(name)
    elastic = Elastic(program)
    full, ids = logits_of(program), tokens(1, 6)
    for width in (1.0, 0.5, 0.25):
        found = speculate(full, logits_of(elastic.at(width)), ids, 17, ahead=ahead)
        assert torch.equal(found.ids, greedy_sample(full, ids, 17))
        assert sum(found.accepted) + len(found.accepted) == 17 and found.full_runs == len(found.accepted)
        if width == 1.0:
            assert found.accepted[:-1] == (ahead,) * (len(found.accepted) - 1) and found.tokens_per_run > 1


def test_a_hopeless_draft_costs_runs_and_nothing_else() -> None:
    program, _ = nested("llama")
    full, ids = logits_of(program), tokens(1, 6)

    def wrong(text: Tensor) -> Tensor:
        return -full(text)

    found = speculate(full, wrong, ids, 5, ahead=2)
    assert torch.equal(found.ids, greedy_sample(full, ids, 5)) and found.mean_accepted == 0 and found.full_runs == 5 and found.tokens_per_run == 1


def test_refusals() -> None:
    for ids, new, ahead in ((tokens(2, 4), 3, 1), (tokens(1, 4), 0, 1), (tokens(1, 4), 3, 0)):
        with pytest.raises(CalibrationError, match=r"expected ids \[1, S >= 1\]"):
            speculate(lambda x: x, lambda x: x, ids, new, ahead=ahead)
