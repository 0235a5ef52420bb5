"""The closed forms of modular decomposition: each is what it claims to be the optimum of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxpress.passes.modular import channel_scores, greedy_neurons, nystrom, output_error, pair_scores, ridge_leverage, value_only, value_output

NEURONS, WIDTH = 48, 16


def _hidden(seed: int = 0, tokens: int = 600) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator)
    gate, up = torch.randn(2, WIDTH, NEURONS, generator=generator)
    return torch.nn.functional.silu(x @ gate) * (x @ up)


def _gram(rows: Tensor) -> Tensor:
    return (rows.double().t() @ rows.double() / len(rows)).float()


H = _hidden()
GRAM, DOWN = _gram(H), torch.randn(WIDTH, NEURONS, generator=torch.Generator().manual_seed(1))


def _slice(kept: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(WIDTH, NEURONS)
    out[:, kept] = down
    return out


def test_leverage_is_the_diagonal_that_it_says() -> None:
    c = GRAM.double()
    ridge = 0.01 * c.diagonal().mean()
    exact = (c @ torch.linalg.inv(c + ridge * torch.eye(NEURONS, dtype=torch.float64))).diagonal()
    assert torch.allclose(ridge_leverage(GRAM), exact, atol=1e-10)
    assert ridge_leverage(torch.zeros(3, 3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [8, 24, 40])
def test_the_refit_is_least_squares_and_never_worse_than_slicing(count: int) -> None:
    for seed in range(5):
        kept = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(seed))[:count]
        refit = nystrom(GRAM, DOWN, kept)
        assert output_error(GRAM, DOWN, _slice(kept, refit)) <= output_error(GRAM, DOWN, _slice(kept, DOWN[:, kept])) + 1e-7
    exact = torch.linalg.lstsq(H[:, kept].double(), (H @ DOWN.t()).double()).solution.t()
    assert torch.allclose(refit.double(), exact, atol=1e-3)


def test_all_neurons_are_exact_and_singular_grams_are_no_error() -> None:
    everything = torch.arange(NEURONS)
    assert torch.allclose(nystrom(GRAM, DOWN, everything), DOWN, atol=1e-3)
    few = _gram(_hidden(tokens=5))
    kept, _ = greedy_neurons(few, DOWN, 12)
    assert len(set(kept.tolist())) == 12
    assert output_error(few, DOWN, _slice(kept, nystrom(few, DOWN, kept))) < 1e-2  # five tokens need five neurons


def test_gains_are_no_more_than_there_is_to_explain() -> None:
    """Neurons are not picked out of what rounding leaves of a float32 Gram with fewer tokens than neurons, nor forgotten beside a huge one."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        hidden, down = torch.randn(40, 96, generator=generator), torch.randn(40, 96, generator=generator)
        hidden[:, 0] *= 1e5 if seed % 2 else 1
        gram = hidden.t() @ hidden / 40
        kept, gained = greedy_neurons(gram, down, 96)
        assert sorted(kept.tolist()) == list(range(96))
        energy = float(((down.double() @ gram.double()) * down.double()).sum())
        assert float(gained.sum()) < 1.01 * energy and int((gained > 0).sum()) >= 39


def test_greedy_choice_beats_leverage_on_the_output() -> None:
    for count in (16, 24, 32):
        kept, gains = greedy_neurons(GRAM, DOWN, count)
        by_leverage = ridge_leverage(GRAM).argsort(descending=True)[:count]
        ours, theirs = (output_error(GRAM, DOWN, _slice(k, nystrom(GRAM, DOWN, k))) for k in (kept, by_leverage))
        assert len(set(kept.tolist())) == count and ours < theirs
        power = float(((DOWN.double() @ GRAM.double()) * DOWN).sum())
        assert float(gains.sum()) == pytest.approx((1 - ours**2) * power, rel=1e-5)  # what was gained is what the refit explains


def _rotated(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of `x: [T, D]` by `angles: [T, D / 2]`."""
    a, b = (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, -1)
    first, second = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    return torch.stack([first, second], -1).flatten(1) if interleaved else torch.cat([first, second], -1)


def _pairs(x: Tensor, interleaved: bool) -> Tensor:
    """Energies of the rotary pairs of `x: [T, D]`."""
    energy = x.square().mean(0)
    return energy.view(-1, 2).sum(1) if interleaved else energy.view(2, -1).sum(0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_does_not_change_pair_scores(interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 300, 8, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 8, dtype=torch.float64)
    angles = torch.rand(300, 4, generator=generator, dtype=torch.float64) * 6.28
    before = pair_scores(_pairs(q, interleaved).unsqueeze(0), _pairs(k, interleaved))
    turned = [_rotated(x, angles, interleaved) for x in (q, k)]
    after = pair_scores(_pairs(turned[0], interleaved).unsqueeze(0), _pairs(turned[1], interleaved))
    assert torch.allclose(before, after, rtol=1e-12) and before.shape == (4,)


def test_logits_of_kept_pairs_are_the_dense_logits_restricted_to_them() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    angles = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    kept = torch.tensor([0, 2])
    both = torch.cat([kept, kept + 4])
    dense = _rotated(q, angles, False)[:, both] @ _rotated(k, angles, False)[:, both].t()
    small = _rotated(q[:, both], angles[:, kept], False) @ _rotated(k[:, both], angles[:, kept], False).t()
    assert torch.allclose(dense, small, atol=1e-12)


def test_channel_scores_are_products_of_norms() -> None:
    q, k = torch.rand(8) + 0.1, torch.rand(8) + 0.1
    assert torch.allclose(channel_scores(q.unsqueeze(0), k), (q * k).double().sqrt())
    rows_q, rows_k = torch.randn(2, 50, 8, dtype=torch.float64)
    roots = []
    for rows in (rows_q, rows_k):
        values, vectors = torch.linalg.eigh(rows.t() @ rows / 50)
        roots.append(((vectors * values.sqrt()) @ vectors.t()).norm(dim=0))
    assert torch.allclose(channel_scores(rows_q.square().mean(0).unsqueeze(0), rows_k.square().mean(0)), roots[0] * roots[1])


def _heads(groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 32, generator=generator) * torch.logspace(0, -1.5, 32)
    return _gram(x), torch.randn(12, 32, generator=generator), torch.randn(groups, 20, 12, generator=generator)


def _product_error(gram: Tensor, value: Tensor, outputs: Tensor, new: tuple[Tensor, Tensor]) -> float:
    return output_error(gram, (outputs @ value).flatten(0, 1), (new[1] @ new[0]).flatten(0, 1))


@pytest.mark.parametrize("rank", [3, 6, 12])
def test_one_head_is_the_svd_of_the_product(rank: int) -> None:
    gram, value, outputs = _heads(1)
    root = torch.linalg.cholesky(gram.double())
    values = torch.linalg.svdvals((outputs[0] @ value).double() @ root)
    expected = float((values[rank:].square().sum() / values.square().sum()) ** 0.5)
    assert _product_error(gram, value, outputs, value_output(gram, value, outputs, rank)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rank", [4, 8, 10])
def test_stacked_heads_are_never_worse_than_the_value_alone(rank: int) -> None:
    gram, value, outputs = _heads(4)
    outputs = outputs * torch.logspace(0, -1, 12)  # heads that hardly read some channels
    stacked, alone = (_product_error(gram, value, outputs, f(gram, value, outputs, rank)) for f in (value_output, value_only))
    assert stacked < alone
