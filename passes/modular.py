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
from .spectra import spectrum


def ridge_leverage(gram: Tensor, ridge: float = 0.01) -> Tensor:
    """`[C (C + l I)^-1]_ii` of a Gram `[M, M]`, float64 `[M]`, l being `ridge` times the mean diagonal: how hard a neuron is to make from the others."""
    c = gram.double()
    damping = ridge * float(c.diagonal().mean()) or 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(c + damping * torch.eye(len(c), dtype=c.dtype)))
    return 1 - damping * inverse.diagonal()


def greedy_neurons(gram: Tensor, down: Tensor, count: int, block: int = 32) -> Tensor:
    """`count` neurons, in the order chosen, that explain most of the output `down @ h` of `down: [N, M]` on data of Gram `[M, M]`.

    Neuron j takes `|down R_j|^2 / R_jj` off the output error, R being the Gram's residual; of `block` candidates at a time those are taken that stay best
    while the residual is updated by each (pivoted Cholesky). Fewer come back when nothing is left to explain: the rest by their leverage.
    """
    residual, outputs = gram.double().clone(), gram.double() @ down.double().t()  # [M, M], [M, N]: R down^T
    floor = 1e-10 * float(residual.diagonal().max())
    kept: list[int] = []
    left = torch.ones(len(residual), dtype=torch.bool)
    while len(kept) < count:
        diagonal = residual.diagonal()
        gains = torch.where(left & (diagonal > floor), outputs.square().sum(1) / diagonal.clamp_min(1e-300), torch.zeros(()).double())
        best = int(gains.argmax())
        if float(gains[best]) <= 0:
            break
        kept.append(best)
        left[best] = False
        column, pivot = residual[:, best].clone(), float(residual[best, best])
        outputs -= torch.outer(column / pivot, outputs[best].clone())
        residual -= torch.outer(column / pivot, column)
    rest = ridge_leverage(gram).masked_fill(~left, -1.0).argsort(descending=True)[: count - len(kept)]
    return torch.cat([torch.tensor(kept, dtype=torch.int64), rest])


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
    return max(float(((delta @ c) * delta).sum()) / max(float(((old.double() @ c) * old).sum()), 1e-300), 0.0) ** 0.5


def pair_scores(query_energy: Tensor, key_energy: Tensor, *, interleaved: bool = False) -> Tensor:
    """Score of every rotary pair of a key head, `[D / 2]`, from mean squares of the queries `[G, D]` that share it and of the key `[D]`.

    Pairs are channels i and i + D/2, or 2i and 2i + 1 when `interleaved`. A rotation keeps a pair's energy, so the score is the same before and after it.
    """
    queries, key = _pairs(query_energy.double(), interleaved), _pairs(key_energy.double(), interleaved)
    return (queries * key).square().sum(0).sqrt()


def channel_scores(query_energy: Tensor, key_energy: Tensor) -> Tensor:
    """Score of every channel of a key head without rotary embedding, `[D]`, from mean squares of the queries `[G, D]` that share it and of the key `[D]`.

    For one head `sqrt(C_q,ii C_k,ii)`: the norms of the columns of the Grams' symmetric roots are the roots of their diagonals.
    """
    return (query_energy.double() * key_energy.double()).sum(0).sqrt()


def _pairs(energy: Tensor, interleaved: bool) -> Tensor:
    half = energy.shape[-1] // 2
    return energy.unflatten(-1, (half, 2)).sum(-1) if interleaved else energy.unflatten(-1, (2, half)).sum(-2)


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
