"""Two-site matrix product operators, which are sums of Kronecker products: fitted to what a weight does to its data, and written as chains.

`W[(a, c), (b, d)] ~ sum_r A[a, b, r] B[r, c, d]` with modes a, c of the outputs and b, d of the inputs. Members of the family t have b and c of size t: t = 1
is the plain low-rank pair, and at one bond every member holds the same number of weights, while the arithmetic grows with t (our derivation). The weight's
own optimum is an SVD of Van Loan's rearrangement, as in CompactifAI (arXiv 2401.14109); under a Gram there is no closed form for t > 1, so the cores are
refined by L-BFGS from the better of two starts, that SVD and one of the weight whitened by the nearest Kronecker product of the Gram (both ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.chain import AddBias, Chain, Cut, Flatten, Link, Pad, Product, Swap, Unflatten
from ..ir.trains import decompose
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


def fit(matrix: Tensor, modes: Modes, chi: int, gram: Tensor | None, steps: int) -> tuple[Cores, float]:
    """Cores of `matrix: [N, K]` under the Gram `[K, K]` (None: the weight's own error), and the relative error that is left."""
    if modes.b == modes.c == 1:
        found = spectrum(matrix, gram)
        down, up = found.factors(chi)
        return Cores(first=up.unsqueeze(1), second=down.unsqueeze(1), rows=len(matrix), columns=matrix.shape[1]), found.error(chi)
    plain = _svd(matrix, modes, chi)
    if gram is None:
        return plain, _error(plain, matrix, torch.eye(matrix.shape[1]))
    starts = [plain, _whitened(matrix, modes, chi, gram)]
    best = min(starts, key=lambda cores: _error(cores, matrix, gram))
    refined = _refined(best, matrix, gram, steps)
    return refined, _error(refined, matrix, gram)


def _svd(matrix: Tensor, modes: Modes, chi: int) -> Cores:
    first, second = decompose(matrix, (modes.a, modes.c), (modes.b, modes.d), chi=chi).cores
    root = second.flatten(1).norm(dim=1).sqrt()  # both cores of one size: better conditioned for refinement
    return Cores(first=(first[0] * root).float(), second=(second[..., 0] / root.view(-1, 1, 1)).float(), rows=len(matrix), columns=matrix.shape[1])


def _error(cores: Cores, matrix: Tensor, gram: Tensor) -> float:
    delta = (cores.matrix() - matrix).double()
    power = float(((matrix.double() @ gram.double()) * matrix).sum())
    return (max(float(((delta @ gram.double()) * delta).sum()), 0.0) / max(power, 1e-300)) ** 0.5


def _whitened(matrix: Tensor, modes: Modes, chi: int, gram: Tensor) -> Cores:
    """SVD of the weight times the root of the partial traces' Kronecker product, undone in each core."""
    columns, size = matrix.shape[1], modes.b * modes.d
    padded = torch.zeros(size, size, dtype=torch.float64)
    padded[:columns, :columns] = gram
    blocks = padded.view(modes.b, modes.d, modes.b, modes.d)
    left, left_inverse = roots(torch.einsum("idjd->ij", blocks))
    right, right_inverse = roots(torch.einsum("bibj->ij", blocks))
    wide = torch.nn.functional.pad(matrix.double(), (0, size - columns))
    cores = _svd(wide @ torch.kron(left, right), modes, chi)
    first = torch.einsum("abr,be->aer", cores.first.double(), left_inverse).float()
    second = torch.einsum("rcd,de->rce", cores.second.double(), right_inverse).float()
    return Cores(first=first, second=second, rows=len(matrix), columns=columns)


def roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and inverse root of `gram: [K, K]`, eigenvalues raised to 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(max(1e-6 * float(values[-1]), 1e-30)).sqrt()
    return (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()


def _refined(start: Cores, matrix: Tensor, gram: Tensor, steps: int) -> Cores:
    """L-BFGS on both cores; never worse than the start."""
    if steps == 0:
        return start
    power = float(((matrix @ gram) * matrix).sum())
    first, second = (core.clone(memory_format=torch.contiguous_format).requires_grad_() for core in (start.first, start.second))
    optimizer = torch.optim.LBFGS([first, second], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-9)

    def loss() -> float:
        optimizer.zero_grad()
        delta = Cores(first=first, second=second, rows=start.rows, columns=start.columns).matrix() - matrix
        value = ((delta @ gram) * delta).sum() / max(power, 1e-30)
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(loss)
    done = Cores(first=first.detach(), second=second.detach(), rows=start.rows, columns=start.columns)
    return done if _error(done, matrix, gram) <= _error(start, matrix, gram) else start


def as_chain(cores: Cores) -> Chain:
    """Reshapes and two products, the core first that leaves less to do; a plain pair when b and c are 1."""
    a, b, chi = cores.first.shape
    c, d = cores.second.shape[1:]
    if b == c == 1:
        return Product(name="inner", weight=cores.second.reshape(chi, d)), Product(name="outer", weight=cores.first.reshape(a, chi))
    before: list[Link] = [Pad(count=b * d - cores.columns)] if b * d > cores.columns else []
    after: list[Link] = [Cut(size=cores.rows)] if a * c > cores.rows else []
    modes = Modes(a=a, b=b, c=c, d=d)
    b_first, a_first = modes.multiplications(chi)
    middle = _second_first(cores, modes) if b_first <= a_first else _first_first(cores, modes)
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
