"""Tucker-2 decompositions of convolution kernels, and how many components a noisy matrix has.

Sources: Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications", ICLR 2016 (arXiv 1511.06530); HOOI: De
Lathauwer et al., SIAM J. Matrix Anal. Appl. 2000; ranks: Nakajima et al., "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 2013. Fitting core and output factor to the data at once is a reduced-rank regression, ours for kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log, sqrt

import torch
from torch import Tensor

from .kronecker_sum import roots
from .spectra import spectrum

SWEEPS = 3


@dataclass(frozen=True, kw_only=True)
class Tucker2:
    """`reduce: [Rc, C]`, `core: [Rf, Rc, P]` (P kernel positions), `expand: [F, Rf]`, float32."""

    reduce: Tensor
    core: Tensor
    expand: Tensor

    def kernel(self) -> Tensor:
        """What they stand for, `[F, C, P]`."""
        inner = (self.expand @ self.core.flatten(1)).view(len(self.expand), *self.core.shape[1:])
        return torch.einsum("frp,rc->fcp", inner, self.reduce)


def hooi(kernel: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor]:
    """Orthonormal `[C, Rc]` and `[F, Rf]` of a kernel `[F, C, P]`: HOSVD, then alternating sweeps that never raise the error. float64."""
    k = kernel.double()
    inputs, outputs = leading(k.transpose(0, 1), rank_in), leading(k, rank_out)
    for _ in range(SWEEPS):
        inputs = leading(torch.einsum("fcp,fr->crp", k, outputs), rank_in)
        outputs = leading(torch.einsum("fcp,cr->frp", k, inputs), rank_out)
    return inputs, outputs


def leading(tensor: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors of the unfolding along the first axis."""
    flat = tensor.reshape(len(tensor), -1)
    return torch.linalg.eigh(flat @ flat.t())[1].flip(1)[:, :rank]


def decompose(kernel: Tensor, rank_in: int, rank_out: int, gram: Tensor | None = None) -> Tucker2:
    """Factors of `kernel: [F, C, P]`; with the Gram `[C P, C P]` of the patches, fitted to what the convolution does to its data.

    Input channels are then chosen under the Gram's channel marginal, and core and output factor are the best for the full Gram given them.
    """
    if gram is None:
        inputs, outputs = hooi(kernel, rank_in, rank_out)
        core = torch.einsum("fcp,fo,ci->oip", kernel.double(), outputs, inputs)
        return Tucker2(reduce=inputs.t().float().contiguous(), core=core.float(), expand=outputs.float())
    channels, positions = kernel.shape[1:]
    c = gram.double()
    marginal = torch.einsum("cpdp->cd", c.view(channels, positions, channels, positions))
    root, inverse = roots(marginal)
    inputs, _ = hooi(torch.einsum("fcp,cd->fdp", kernel.double(), root), rank_in, rank_out)
    reduce = torch.linalg.qr(inverse @ inputs)[0].t()  # what reads the whitened directions off the data, of unit size
    return _regressed(kernel, reduce, rank_out, c)


def _regressed(kernel: Tensor, reduce: Tensor, rank_out: int, gram: Tensor) -> Tucker2:
    """The best core and output factor for given reduced inputs: least squares, then its best rank under what the inputs are."""
    rows, _, positions = kernel.shape
    taken = torch.kron(reduce, torch.eye(positions, dtype=torch.float64))  # [Rc P, C P]
    cross = kernel.double().flatten(1) @ gram @ taken.t()
    inner = taken @ gram @ taken.t()
    damping = max(1e-9 * float(inner.diagonal().mean()), 1e-30)
    fitted = torch.linalg.solve(inner + damping * torch.eye(len(inner), dtype=torch.float64), cross.t()).t()
    down, up = spectrum(fitted, inner).factors(rank_out)
    return Tucker2(reduce=reduce.float(), core=down.view(rank_out, len(reduce), positions), expand=up.view(rows, rank_out))


def energy_rank(values: Tensor, tolerance: float) -> int:
    """The fewest leading values (falling, of squares) whose tail is at most `tolerance^2` of the sum."""
    left = values.sum() - values.cumsum(0)
    return min(1 + int((left > tolerance**2 * values.sum()).sum()), len(values))


def evbmf_rank(matrix: Tensor) -> int:
    """Components of `matrix: [L, M]` above its noise, by empirical variational Bayes with an unknown noise variance.

    Trained weights have no flat noise floor: take it as a hint and look at the measured error.
    """
    flat = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().t()
    rows, columns = flat.shape
    squares = torch.linalg.svdvals(flat).square()
    alpha = rows / columns
    tau = 2.5129 * sqrt(alpha)
    bound = (1 + tau) * (1 + alpha / tau)
    upper = float(squares.sum()) / (rows * columns)
    start = max(0, min(ceil(rows / (1 + alpha)) - 1, rows - 1))
    tail = squares[start:]
    lower = max(float(tail.mean()) / columns, float(squares[start]) / (columns * bound))
    lower = min(max(lower, upper * 1e-9), upper)
    grid = torch.exp(torch.linspace(log(max(lower, 1e-300)), log(max(upper, 1e-300)), 2000, dtype=torch.float64))
    costs = torch.stack([_free_energy(squares / (columns * s), alpha, bound) for s in grid])
    noise = float(grid[int(costs.argmin())])
    return int((squares > columns * noise * bound).sum())


def _free_energy(x: Tensor, alpha: float, bound: float) -> Tensor:
    """Of scaled squared singular values x, up to constants."""
    x = x.clamp_min(1e-300)
    kept = x[x > bound]
    t = 0.5 * (kept - (1 + alpha) + ((kept - (1 + alpha)).square() - 4 * alpha).clamp_min(0).sqrt())
    gain = torch.log(t + 1) + alpha * torch.log(t / alpha + 1) - t
    return (x - torch.log(x)).sum() + gain.sum()
