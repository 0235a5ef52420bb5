"""One-way filters for a kernel: drawn for training from the start, or the best terms of a trained kernel, every output map fitted on its own.

Fitting is canonical polyadic decomposition by alternating least squares (see `cp`), of all maps at once; maps whose terms grow and cancel are fitted again
under a larger ridge. Two axes are a singular value decomposition.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ..ir.oneway import CHANNELS, filter_shapes
from .cp import LARGEST, RIDGES, STARTS, SWEEPS, balanced, khatri_rao


def drawn(shape: tuple[int, ...], terms: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal filters whose products have the variance `2 / (C prod k)` that rectifiers want (He et al. 2015); every filter has its fan-in's part of it."""
    shapes = filter_shapes(shape, terms)
    last = list(shapes)[-1]
    found = {}
    for name, size in shapes.items():
        inputs = size[1] if name == CHANNELS else max(size[2:])
        variance = 1.0 / inputs if name != last else 2.0 / (inputs * terms)
        found[name] = torch.randn(size, generator=generator, device="cpu") * variance**0.5
    return found


def fitted(weight: Tensor, terms: int, generator: torch.Generator) -> tuple[dict[str, Tensor], float, float]:
    """Filters of `weight: [F, C, *k]`, the relative error that is left, and how large the terms of the worst map are together, over the map's norm.

    Above 1 terms cancel in part; far above it, training and rounding suffer (de Silva and Lim 2008).
    """
    shapes = filter_shapes(tuple(weight.shape), terms)
    maps = weight.double().reshape(len(weight), *[n for n in weight.shape[1:] if n > 1])
    factors = _pair(maps, terms) if maps.dim() == 3 else _als(maps, terms, generator)
    rest = _product(factors) - maps
    size = maps.flatten(1).norm(dim=1).clamp_min(1e-30)
    cancelling = float((_term_norms(factors) / size).max())
    named = {n: _laid(f, shapes[n], last=n == list(shapes)[-1]) for n, f in zip(shapes, factors, strict=True)}
    return named, float(rest.norm() / maps.norm().clamp_min(1e-30)), cancelling


def _laid(factor: Tensor, shape: tuple[int, ...], *, last: bool) -> Tensor:
    """`[F, size, R]` as the stored filter: maps and their terms in front, or the terms as inputs of a grouped convolution."""
    return factor.transpose(1, 2).reshape(shape).float().contiguous() if last else factor.transpose(1, 2).flatten(0, 1).reshape(shape).float().contiguous()


def _product(factors: list[Tensor]) -> Tensor:
    """`[F, n1, n2, ...]` of factors `[F, n, R]`."""
    rows = khatri_rao(factors[1:])
    return (factors[0] @ rows.transpose(1, 2)).view(len(factors[0]), *(f.shape[1] for f in factors))


def _term_norms(factors: list[Tensor]) -> Tensor:
    """Root of the summed squared norms of each map's terms, `[F]`."""
    return reduce(torch.mul, (f.square().sum(1) for f in factors)).sum(1).sqrt()


def _pair(maps: Tensor, terms: int) -> list[Tensor]:
    """Two axes: singular vectors, the values shared between both sides; missing terms are zero."""
    left, values, right = torch.linalg.svd(maps, full_matrices=False)
    kept = min(terms, values.shape[1])
    root = values[:, :kept].sqrt().unsqueeze(1)
    found = [left[:, :, :kept] * root, right[:, :kept].transpose(1, 2) * root]
    return [torch.nn.functional.pad(f, (0, terms - kept)) for f in found]


def _als(maps: Tensor, terms: int, generator: torch.Generator) -> list[Tensor]:
    """The best of some starts for every map, under the least ridge that keeps its terms from cancelling."""
    size = maps.flatten(1).norm(dim=1).clamp_min(1e-30)
    best = [torch.zeros(len(maps), n, terms, dtype=maps.dtype) for n in maps.shape[1:]]
    waiting = torch.arange(len(maps))
    for ridge in RIDGES:
        part, error = maps[waiting], torch.full((len(waiting),), torch.inf, dtype=maps.dtype)
        found = [f[waiting] for f in best]
        for start in range(STARTS):
            tried = _sweep(part, terms, ridge, generator, leading=start == 0)
            mine = (_product(tried) - part).flatten(1).norm(dim=1)
            better = mine < error
            error = torch.where(better, mine, error)
            found = [torch.where(better.view(-1, 1, 1), new, old) for new, old in zip(tried, found, strict=True)]
        bounded = (_term_norms(found) <= LARGEST * size[waiting]) | (ridge == RIDGES[-1])
        for old, new in zip(best, found, strict=True):
            old[waiting[bounded]] = new[bounded]
        waiting = waiting[~bounded]
        if not len(waiting):
            break
    return best


def _sweep(maps: Tensor, terms: int, ridge: float, generator: torch.Generator, *, leading: bool) -> list[Tensor]:
    """Alternating least squares for all maps at once, from leading singular vectors or at random."""
    factors = [_start(maps, mode, terms, generator, leading) for mode in range(1, maps.dim())]
    last = torch.inf
    for _ in range(SWEEPS):
        for mode in range(len(factors)):
            others = [f for i, f in enumerate(factors) if i != mode]
            gram = reduce(torch.mul, (f.transpose(1, 2) @ f for f in others))
            damping = (ridge * gram.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(1e-30)
            right = maps.movedim(mode + 1, 1).flatten(2) @ khatri_rao(others)
            eye = torch.eye(terms, dtype=maps.dtype)
            factors[mode] = torch.linalg.solve(gram + damping.view(-1, 1, 1) * eye, right.transpose(1, 2)).transpose(1, 2)
            factors = balanced(factors)
        error = float((_product(factors) - maps).norm())
        if last - error < 1e-7 * max(error, 1e-12):
            break
        last = error
    return factors


def _start(maps: Tensor, mode: int, terms: int, generator: torch.Generator, leading: bool) -> Tensor:
    unfolded = maps.movedim(mode, 1).flatten(2)
    random = torch.randn(*unfolded.shape[:2], terms, generator=generator, dtype=torch.float64, device="cpu").to(maps)
    if not leading:
        return random
    left = torch.linalg.svd(unfolded, full_matrices=False)[0][:, :, :terms]
    return torch.cat([left, 0.1 * random[:, :, left.shape[2] :]], 2)
