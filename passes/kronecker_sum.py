"""Two-site matrix product operators, which are sums of Kronecker products: fitted to what a weight does to its data, and written as chains.

`W[(a, c), (b, d)] ~ sum_r A[a, b, r] B[r, c, d]` with modes a, c of the outputs and b, d of the inputs. Members of the family t have b and c of size t: t = 1
is the plain low-rank pair, and at one bond every member holds the same number of weights, while the arithmetic grows with t (our derivation). The weight's
own optimum is an SVD of Van Loan's rearrangement, as in CompactifAI (arXiv 2401.14109); under a Gram there is no closed form for t > 1, so the cores are
refined by alternating least squares (`kronecker_fit`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.chain import AddBias, Chain, Cut, Flatten, Link, Pad, Product, Swap, Unflatten
from .kronecker_fit import Fit, Whitening, rearranged, whitening
from .relative import relative_error
from .spectra import spectrum


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Sizes a, c of the outputs and b, d of the inputs; the products may exceed the weight's, zeros then stand behind it."""

    a: int
    b: int
    c: int
    d: int

    def parameters(self, chi: int) -> int:
        """Numbers in both cores."""
        return chi * (self.a * self.b + self.c * self.d)

    @property
    def full(self) -> int:
        """The bond at which any weight is held exactly."""
        return min(self.a * self.b, self.c * self.d)

    def multiplications(self, chi: int) -> tuple[int, int]:
        """Multiply-adds a token, with B first and with A first."""
        inputs, outputs = self.b * self.d, self.a * self.c
        return chi * (self.c * inputs + self.b * outputs), chi * (self.a * inputs + self.d * outputs)


def family(rows: int, columns: int, t: int) -> Modes:
    """The member t for a weight `[rows, columns]`, padded to multiples of t."""
    return Modes(a=-(-rows // t), b=t, c=t, d=-(-columns // t))


@dataclass(frozen=True, kw_only=True)
class Cores:
    """`first: [a, b, chi]` and `second: [chi, c, d]` of a weight of shape `[rows, columns]`."""

    first: Tensor
    second: Tensor
    rows: int
    columns: int

    def matrix(self) -> Tensor:
        """What they stand for."""
        a, b, chi = self.first.shape
        c, d = self.second.shape[1:]
        joined = self.first.reshape(a * b, chi) @ self.second.reshape(chi, c * d)
        return joined.view(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)[: self.rows, : self.columns]


def fit(matrix: Tensor, modes: Modes, chi: int, gram: Tensor | None, steps: int, white: Whitening | None = None) -> tuple[Cores, float]:
    """Cores of `matrix: [N, K]` under the Gram `[K, K]` (None: the weight's own error), and the relative error that is left.

    `steps` bounds the rounds of refinement; `white` is the Gram's `whitening` for these modes, where it is known already.
    """
    if modes.b == modes.c == 1:
        found = spectrum(matrix, gram)
        down, up = found.factors(chi)
        return Cores(first=up.unsqueeze(1), second=down.unsqueeze(1), rows=len(matrix), columns=matrix.shape[1]), found.error(chi)
    if gram is None:
        return _plain(matrix, modes, chi)
    running = Fit(matrix, modes, white or whitening(gram, modes), chi)
    running.refine(steps)
    cores, error = finished(running, matrix, gram)
    if steps == 0 and (other := _error(plain := _plain(matrix, modes, chi)[0], matrix, gram)) < error:
        return plain, other
    return cores, error


def finished(running: Fit, matrix: Tensor, gram: Tensor) -> tuple[Cores, float]:
    """Its cores for inputs as they are, and their error."""
    first, second = running.cores()
    cores = Cores(first=first, second=second, rows=len(matrix), columns=matrix.shape[1])
    return cores, _error(cores, matrix, gram)


def _plain(matrix: Tensor, modes: Modes, chi: int) -> tuple[Cores, float]:
    """The best cores for the weight itself, both of one size, and their error."""
    found = spectrum(rearranged(matrix, modes))
    second, first = found.factors(chi)
    root = second.norm(dim=1).sqrt().clamp_min(1e-30)
    cores = Cores(
        first=(first * root).view(modes.a, modes.b, chi),
        second=(second / root.unsqueeze(1)).view(chi, modes.c, modes.d),
        rows=len(matrix),
        columns=matrix.shape[1],
    )
    return cores, found.error(chi)


def _error(cores: Cores, matrix: Tensor, gram: Tensor) -> float:
    """In float64: a Gram of massive activations has eigenvalues so far apart that float32 would not see the small ones."""
    wide, w = gram.double(), matrix.double()
    delta = cores.matrix().double() - w
    left, power = (float(((rows @ wide) * rows).sum()) for rows in (delta, w))
    return relative_error(left, power)


def roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and inverse root of `gram: [K, K]`, eigenvalues raised to 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(max(1e-6 * float(values[-1]), 1e-30)).sqrt()
    return (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()


def as_chain(cores: Cores, second_first: bool | None = None) -> Chain:
    """Reshapes and two products, the second core first or the first (None: what leaves less to do); a plain pair when b and c are 1."""
    a, b, chi = cores.first.shape
    c, d = cores.second.shape[1:]
    if b == c == 1:
        return Product(name="inner", weight=cores.second.reshape(chi, d)), Product(name="outer", weight=cores.first.reshape(a, chi))
    before: list[Link] = [Pad(count=b * d - cores.columns)] if b * d > cores.columns else []
    after: list[Link] = [Cut(size=cores.rows)] if a * c > cores.rows else []
    modes = Modes(a=a, b=b, c=c, d=d)
    b_first, a_first = modes.multiplications(chi)
    chosen = b_first <= a_first if second_first is None else second_first
    middle = _second_first(cores, modes) if chosen else _first_first(cores, modes)
    return *before, Unflatten(sizes=(b, d)), *middle, Flatten(), *after, AddBias()


def _second_first(cores: Cores, modes: Modes) -> tuple[Link, ...]:
    """`[b, d] -> [b, (c, r)] -> [c, (b, r)] -> [c, a] -> [a, c]`."""
    chi = cores.first.shape[2]
    inner = cores.second.permute(1, 0, 2).reshape(modes.c * chi, modes.d)
    outer = cores.first.reshape(modes.a, modes.b * chi)
    moves = (Unflatten(sizes=(modes.c, chi)), Swap(first=-3, second=-2), Flatten())
    return Product(name="inner", weight=inner.contiguous()), *moves, Product(name="outer", weight=outer.contiguous()), Swap()


def _first_first(cores: Cores, modes: Modes) -> tuple[Link, ...]:
    """`[b, d] -> [d, b] -> [d, (a, r)] -> [a, (d, r)] -> [a, c]`."""
    chi = cores.first.shape[2]
    inner = cores.first.permute(0, 2, 1).reshape(modes.a * chi, modes.b)
    outer = cores.second.permute(1, 2, 0).reshape(modes.c, modes.d * chi)
    moves = (Unflatten(sizes=(modes.a, chi)), Swap(first=-3, second=-2), Flatten())
    return Swap(), Product(name="inner", weight=inner.contiguous()), *moves, Product(name="outer", weight=outer.contiguous())
