"""Modular decomposition: smaller inner dimensions of feed-forward networks and attention heads, the module's own output kept as well as it can be.

Source: MoDeGPT (arXiv 2408.09632). Type I (feed-forward) is a Nystrom approximation: neurons by ridge leverage, the down-projection fitted anew. Type II
(queries and keys) is a CR decomposition: channels by the product of their norms. Type III (values and outputs) is an SVD of the product. Ours: the
output-aware greedy choice of neurons, pair scores that rotary embeddings cannot change, and one SVD for all output heads that share a value head.
Weights stand as torch stores them, `[outputs, inputs]`; Grams are means of x x^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.errors import PassError
from .relative import relative_error
from .spectra import spectrum

FLOOR = 1e-6  # of a neuron's own energy: what is left of it below that is rounding of a float32 Gram


def ridge_leverage(gram: Tensor, ridge: float = 0.01) -> Tensor:
    """`[C (C + l I)^-1]_ii` of a Gram `[M, M]`, float64 `[M]`, l being `ridge` times the mean diagonal: how hard a neuron is to make from the others."""
    c = gram.double()
    damping = ridge * float(c.diagonal().mean()) or 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(c + damping * torch.eye(len(c), dtype=c.dtype)))
    return 1 - damping * inverse.diagonal()


def greedy_neurons(gram: Tensor, down: Tensor, count: int, block: int = 32) -> tuple[Tensor, Tensor]:
    """`count` neurons, in the order chosen, that explain most of the output `down @ h` of `down: [N, M]` on data of Gram `[M, M]`, and what each explains.

    Neuron j takes `|down R_j|^2 / R_jj` off the squared output error, R being the Gram's residual (a pivoted Cholesky that looks at the output). Of `block`
    candidates at a time those are taken that stay ahead of the others while they explain away each other's part. Neurons with nothing left to explain come
    last, by their leverage.
    """
    residual = gram.double().clone()
    outputs = residual @ down.double().t()  # [M, N]: R down^T
    floor = FLOOR * residual.diagonal()
    kept, gained = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    left = torch.ones(len(residual), dtype=torch.bool)
    while len(kept) < count:
        gains = _gains(outputs, residual.diagonal(), left, floor)
        candidates = gains.argsort(descending=True)[: block + 1]
        picked, own = _best_of(
            residual, outputs, candidates[:block], float(gains[candidates[-1]]) if len(candidates) > block else 0.0, floor[candidates[:block]]
        )
        if len(picked) == 0:
            break
        kept, gained = torch.cat([kept, picked]), torch.cat([gained, own])
        left[picked] = False
        share = torch.linalg.solve(residual[picked][:, picked], residual[picked]).t()  # [M, picked]
        outputs -= share @ outputs[picked]
        residual -= share @ residual[picked]
    kept, gained = kept[:count], gained[:count]
    rest = ridge_leverage(gram).masked_fill(~left, -1.0).argsort(descending=True)[: count - len(kept)]
    return torch.cat([kept, rest]), torch.cat([gained, torch.zeros(len(rest), dtype=torch.float64)])


def _gains(outputs: Tensor, diagonal: Tensor, left: Tensor, floor: Tensor) -> Tensor:
    """What every neuron explains, 0 where it is taken or has nothing of its own."""
    return torch.where(left & (diagonal > floor), outputs.square().sum(1) / diagonal.clamp_min(1e-300), torch.zeros((), dtype=torch.float64))


def _best_of(residual: Tensor, outputs: Tensor, candidates: Tensor, ahead: float, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates one after another, each given those before it, while the best still explains more than `ahead`."""
    r, o = residual[candidates][:, candidates].clone(), outputs[candidates].clone()
    left = torch.ones(len(candidates), dtype=torch.bool)
    picked: list[int] = []
    gained: list[float] = []
    while bool(left.any()):
        gains = _gains(o, r.diagonal(), left, floor)
        best = int(gains.argmax())
        if float(gains[best]) <= 0 or (picked and float(gains[best]) < ahead):
            break
        picked.append(best)
        gained.append(float(gains[best]))
        left[best] = False
        share = r[:, best].clone() / r[best, best]
        o -= torch.outer(share, o[best].clone())
        r -= torch.outer(share, r[best].clone())
    return candidates[torch.tensor(picked, dtype=torch.int64)], torch.tensor(gained, dtype=torch.float64)


def nystrom(gram: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """The down-projection `[N, k]` of the `kept` neurons that comes nearest to the old `[N, M]` one on data of Gram `[M, M]`: least squares, float32.

    Where the kept neurons depend on each other the Gram is damped by as little as lets it be factored.
    """
    c = gram.double()
    inner = c[kept][:, kept]
    jitter = 1e-8 * float(inner.diagonal().mean()) or 1.0
    for _ in range(10):
        lower, failed = torch.linalg.cholesky_ex(inner + jitter * torch.eye(len(kept), dtype=c.dtype))
        if not int(failed):
            return torch.cholesky_solve(c[kept] @ down.double().t(), lower).t().float()
        jitter *= 10
    raise PassError(f"the Gram of {len(kept)} kept neurons cannot be factored even with damping {jitter:g}; use more or cleaner calibration data")


def output_error(gram: Tensor, old: Tensor, new: Tensor) -> float:
    """Relative error of `new @ h` for `old @ h`, both `[N, M]`, on data of Gram `[M, M]`."""
    delta, c = (new.double() - old.double()), gram.double()
    return relative_error(float(((delta @ c) * delta).sum()), float(((old.double() @ c) * old).sum()))


def pair_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Score of every rotary pair of a key head, `[P]`, from the energies of the pairs in the queries `[G, P]` that share it and in the key `[P]`.

    A rotation keeps a pair's energy (the mean square of both channels together), so the score is the same before and after it.
    """
    return (queries.double() * keys.double()).square().sum(0).sqrt()


def channel_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Score of every channel of a key head without rotary embedding, `[D]`, from mean squares of the queries `[G, D]` that share it and of the key `[D]`.

    For one head `sqrt(C_q,ii C_k,ii)`: the norms of the columns of the Grams' symmetric roots are the roots of their diagonals.
    """
    return (queries.double() * keys.double()).sum(0).sqrt()


def value_output(gram: Tensor, value: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`value: [D, K]` and the output projections `[G, N, D]` that share it become `[rank, K]` and `[G, N, rank]`, float32.

    The least squared error of all G products on data of Gram `[K, K]`. MoDeGPT decomposes the value alone when several heads share it; with the heads stacked
    the error can only be smaller. Singular values stand in the value, one a row, where a quantizer's scale for every row absorbs them.
    """
    heads, rows, _ = outputs.shape
    v = value.double()
    down, up = spectrum(outputs.reshape(heads * rows, -1), v @ gram.double() @ v.t()).factors(rank)
    return (down.double() @ v).float(), up.view(heads, rows, rank)


def value_only(gram: Tensor, value: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As published for shared value heads: the best `[rank, K]` for the value itself, the rest of the decomposition pushed into each output."""
    down, up = spectrum(value, gram).factors(rank)
    return down, (outputs.double() @ up.double()).float()
