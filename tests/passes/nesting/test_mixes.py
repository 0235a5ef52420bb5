"""Mix'n'Match choices: neighbouring widths, the wider one last."""

from __future__ import annotations

import torch

from fxpress.passes.nesting.mixes import mixes


def test_all_choices_between_neighbours() -> None:
    found = mixes([[1, 2, 4], [10, 20, 40], [3, 6, 12]], 99, torch.Generator())
    assert found == [(1, 10, 6), (1, 20, 6), (2, 20, 12), (2, 40, 12)]


def test_fewer_are_drawn_without_repeats() -> None:
    layers = [[8, 16, 32, 64]] * 12
    one, two = (mixes(layers, 7, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert len(set(one)) == 7 and one != two and all(sorted(m) == list(m) for m in one)
