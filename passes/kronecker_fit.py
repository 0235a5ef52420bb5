"""Two-site cores under a Gram: alternating least squares in coordinates in which the Gram is nearly the identity. Ours.

The loss `tr((W - W') C (W - W')^T)` of `W'[(a, c), (b, d)] = sum_r A[a, b, r] B[r, c, d]` is a least-squares problem in either core. For A all rows share one
normal matrix of size `b chi`: it is solved exactly. For B the normal matrix has size `chi d`: `SOLVES` steps of conjugate gradients follow. Both are well
conditioned because inputs are whitened first by a Kronecker product `S (x) D` near C (one flip-flop step of its maximum-likelihood estimate, Dutilleul 1999,
from the partial traces), and because before each solve the other core is made orthonormal, which the product does not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .kronecker_sum import Modes

SOLVES = 2  # conjugate-gradient steps on the second core in a round (measured: 1 needs more rounds, 3 more time)
SETTLED = 0.006  # a round that lowers the error by less than this share is the last
NOISE = 1e-6  # what float32 leaves of a share of the squared error that is none
FLOOR = 1e-4  # eigenvalues of S and D are raised to this share of the largest
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)  # of the whitened Gram's mean eigenvalue; the least that makes it positive is added


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """Symmetric roots and their inverses `[b, b]` and `[d, d]` float32, and the whitened Gram `[b d, b d] float32`, near the identity."""

    outer: Tensor
    outer_inverse: Tensor
    inner: Tensor
    inner_inverse: Tensor
    gram: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """`rows: [N, b d]` times the root of `S (x) D`."""
        return _times(rows, self.outer, self.inner)


def whitening(gram: Tensor, modes: Modes) -> Whitening:
    """Of a Gram `[K, K]` that is padded with zeros to `b d`; sites with one input share it."""
    b, d = modes.b, modes.d
    padded = F.pad(gram, (0, b * d - len(gram), 0, b * d - len(gram)))
    blocks = padded.double().view(b, d, b, d)
    inner = torch.einsum("bibj->ij", blocks) / b
    inner = inner * (b / inner.trace().clamp_min(1e-30))  # S carries the scale
    outer = torch.einsum("idje,de->ij", blocks, _inverse(inner)) / d
    inner = torch.einsum("idje,ij->de", blocks, _inverse(outer)) / b
    (left, left_inverse), (right, right_inverse) = _roots(outer), _roots(inner)
    half = _times(padded.double(), left_inverse, right_inverse)
    white = _positive(_times(half.t().contiguous(), left_inverse, right_inverse))
    return Whitening(outer=left.float(), outer_inverse=left_inverse.float(), inner=right.float(), inner_inverse=right_inverse.float(), gram=white.float())


def _positive(gram: Tensor) -> Tensor:
    """With a ridge: where the data says nothing (fewer tokens than channels), cores stay near the weight itself, and no step is without a bound."""
    mean, eye = max(float(gram.diagonal().mean()), 1e-30), torch.eye(len(gram), dtype=gram.dtype)
    for ridge in RIDGES:
        ridged = gram + ridge * mean * eye
        if not int(torch.linalg.cholesky_ex(ridged - 0.5 * ridge * mean * eye)[1]):
            return ridged
    return mean * eye


def _times(rows: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """`rows: [N, b d]` times `outer (x) inner`, both symmetric, without forming it."""
    b, d = len(outer), len(inner)
    mixed = rows.reshape(-1, b, d).transpose(1, 2) @ outer
    return (mixed.transpose(1, 2).reshape(-1, d) @ inner).view(-1, b * d)


def _inverse(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors / values.clamp_min(max(FLOOR * float(values[-1]), 1e-30))) @ vectors.t()


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(max(FLOOR * float(values[-1]), 1e-30)).sqrt()
    return (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()


class Fit:
    """Cores `first: [a b, chi]` and `second: [chi, c d]` of whitened `rows: [a c, b d] float32` on the way to less error."""

    def __init__(self, matrix: Tensor, modes: Modes, white: Whitening, chi: int) -> None:
        """Start at the best cores under `S (x) D` alone; `matrix: [N, K]` is padded with zeros."""
        self.modes, self.white = modes, white
        size = (0, modes.b * modes.d - matrix.shape[1], 0, modes.a * modes.c - matrix.shape[0])
        rows = white.apply(F.pad(matrix, size))
        response = rows @ white.gram
        self._target = rearranged(response, modes)
        self._power = float((response.double() * rows).sum())
        self.first, self.second = _leading(rearranged(rows, modes), chi)
        self.share = self._share(self._residual())

    def refine(self, rounds: int) -> bool:
        """At most so many rounds, until one no longer helps; never worse than before. Whether more would still help."""
        for _ in range(rounds):
            before = (self.first, self.second, self.share)
            self._solve_first()
            residual = self._improve_second()
            self.share = self._share(residual)
            if not -NOISE <= self.share < before[2]:
                self.first, self.second, self.share = before
                return False
            if self.share > (1 - SETTLED) ** 2 * before[2]:
                return False
        return True

    @property
    def error(self) -> float:
        """Relative output error of the cores."""
        return max(self.share, 0.0) ** 0.5

    def cores(self) -> tuple[Tensor, Tensor]:
        """`[a, b, chi]` and `[chi, c, d]` float32 for inputs as they are, of about one size."""
        m, chi = self.modes, len(self.second)
        first = self.first.reshape(m.a, m.b, chi).transpose(1, 2) @ self.white.outer_inverse
        second = self.second.reshape(chi, m.c, m.d) @ self.white.inner_inverse
        scale = (second.flatten(1).norm(dim=1) / first.norm(dim=(0, 2)).clamp_min(1e-30)).clamp(1e-12, 1e12).sqrt()
        return (first.transpose(1, 2) * scale).contiguous(), second / scale.view(-1, 1, 1)

    def _response(self, product: Tensor) -> Tensor:
        """`W' C`, rearranged, of a rearranged `W'`."""
        m = self.modes
        rows = product.view(m.a, m.b, m.c, m.d).transpose(1, 2).reshape(m.a * m.c, m.b * m.d)
        return rearranged(rows @ self.white.gram, m)

    def _residual(self) -> Tensor:
        """Minus half the gradient by the second core."""
        return self.first.t() @ (self._target - self._response(self.first @ self.second))

    def _share(self, residual: Tensor) -> float:
        """Squared relative error, from the residual of the second core's normal equations: no product with the Gram is needed."""
        known = (self.first.t() @ self._target + residual).double()
        return (self._power - float((known * self.second).sum())) / max(self._power, 1e-300)

    def _solve_first(self) -> None:
        """The best first core for this second one."""
        m, chi = self.modes, len(self.second)
        lower = _lower(self.second @ self.second.t())
        self.second = torch.linalg.solve_triangular(lower, self.second, upper=False)
        normal = self._normal()
        right = (self._target @ self.second.t()).view(m.a, m.b * chi)
        start = (self.first @ lower).view(m.a, m.b * chi)
        step = torch.cholesky_solve((right - start @ normal).t(), _lower(normal)).t()  # from the present core: the ridge then costs steps, not accuracy
        self.first = (start + step).reshape(m.a * m.b, chi)

    def _normal(self) -> Tensor:
        """`[(b r), (b' r')]`: `sum_c B[r, c] C[b, b'] B[r', c]^T`."""
        m, chi = self.modes, len(self.second)
        flat, blocks = self.second.reshape(chi * m.c, m.d), self.white.gram.view(m.b, m.d, m.b, m.d)
        normal = torch.empty(m.b, chi, m.b, chi)
        for i in range(m.b):
            for j in range(i, m.b):
                block = (flat @ blocks[i, :, j]).view(chi, -1) @ self.second.t()
                normal[i, :, j], normal[j, :, i] = block, block.t()
        return normal.view(m.b * chi, m.b * chi)

    def _improve_second(self) -> Tensor:
        """Conjugate gradients on the second core; returns the residual that is left."""
        lower = _lower(self.first.t() @ self.first)
        self.first = torch.linalg.solve_triangular(lower, self.first.t(), upper=False).t().contiguous()
        self.second = lower.t() @ self.second
        residual = self._residual()
        direction, power = residual, float(residual.double().square().sum())
        for _ in range(SOLVES):
            curved = self.first.t() @ self._response(self.first @ direction)
            curvature = float((curved.double() * direction).sum())
            if curvature <= 0:
                break
            length = power / curvature
            self.second = self.second + length * direction
            residual = residual - length * curved
            left = float(residual.double().square().sum())
            direction, power = residual + left / max(power, 1e-300) * direction, left
        return residual


def whitened_energy(matrix: Tensor, modes: Modes, white: Whitening) -> Tensor:
    """`[min(a b, c d)] float64`: squared singular values, falling, of the rearranged weight under `S (x) D`: a proxy for what each bond is worth."""
    padded = F.pad(matrix, (0, modes.b * modes.d - matrix.shape[1], 0, modes.a * modes.c - matrix.shape[0]))
    wide = rearranged(white.apply(padded), modes).double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.t()
    return torch.linalg.eigvalsh(wide @ wide.t()).flip(0).clamp_min(0.0)


def rearranged(matrix: Tensor, modes: Modes) -> Tensor:
    """Van Loan's rearrangement `[a b, c d]` of `matrix: [N, K]`, padded with zeros: a Kronecker product becomes a matrix of rank one."""
    padded = F.pad(matrix, (0, modes.b * modes.d - matrix.shape[1], 0, modes.a * modes.c - matrix.shape[0]))
    return padded.reshape(modes.a, modes.c, modes.b, modes.d).transpose(1, 2).reshape(modes.a * modes.b, modes.c * modes.d)


def _leading(matrix: Tensor, chi: int) -> tuple[Tensor, Tensor]:
    """`[M, chi]` and `[chi, N]`, whose product is the best approximation of `matrix: [M, N]`; from eigenvectors of the smaller side."""
    if matrix.shape[0] > matrix.shape[1]:
        first, second = _leading(matrix.t(), chi)
        return second.t().contiguous(), first.t().contiguous()
    wide = matrix.double()
    left = torch.linalg.eigh(wide @ wide.t())[1].flip(1)[:, :chi].float()
    return left, left.t() @ matrix


def _lower(matrix: Tensor) -> Tensor:
    """Cholesky factor of a positive matrix, with the least ridge that it needs in float32."""
    mean, eye = float(matrix.diagonal().mean()), torch.eye(len(matrix))
    for ridge in (1e-7, 1e-6, 1e-5, 1e-4):
        factor, failed = torch.linalg.cholesky_ex(matrix + max(ridge * mean, 1e-30) * eye)
        if not int(failed) and bool(torch.isfinite(factor).all()):
            return factor
    return torch.linalg.cholesky(matrix.double() + max(1e-2 * mean, 1e-30) * eye.double()).float()
