"""What an approximation of a weight costs, on one scale for all sites: its output error, each output weighted by how much the loss minds errors there.

`cost = T sum_n s_n E_n C E_n^T` for the error `E = W' - W`, the Gram C (a mean over T rows) and the mean squared output gradients s: the Fisher estimate of the
loss's rise, on the scale of `obs_fisher` scores. Without sensitivities the cost is the squared relative output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ...ir.chain import Convolution, Link, run
from ...ir.site_calls import conv_geometry
from ...ir.sites import WeightSite
from ..spectra import Spectrum, spectrum


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Of one site: `gram: [K, K] f32` of its inputs, or None where only the `inputs` of a convolution are at hand; `sensitivity: [N]` of outputs, or None."""

    site: WeightSite
    tokens: int
    gram: Tensor | None
    inputs: Sequence[Tensor] = ()
    sensitivity: Tensor | None = field(default=None, repr=False)

    @cached_property
    def matrix(self) -> Tensor:
        """The weight, `[N, K] f32`."""
        return self.site.matrix().float()

    @cached_property
    def power(self) -> Tensor:
        """Mean squared output of every row, `[N] f64`."""
        return self._rows(self.matrix)

    def approximation(self, other: Tensor) -> tuple[float, float]:
        """Cost and relative output error of `other: [N, K]`."""
        rows = self._rows(other - self.matrix).clamp_min(0.0)
        error = float(rows.sum()) / max(float(self.power.sum()), 1e-300)
        return error if self.sensitivity is None else self.tokens * float((self.sensitivity.double() * rows).sum()), error**0.5

    def spectrum(self) -> Spectrum:
        """One decomposition for the pairs of all ranks."""
        return spectrum(self.matrix, self.gram, self.sensitivity)

    def pair(self, found: Spectrum, rank: int) -> tuple[float, float]:
        """Cost and relative (weighted) output error of the pair of this rank."""
        left, total = float(found.energy[rank:].sum()), float(found.energy.sum())
        cost = left / max(total, 1e-300) if self.sensitivity is None else self.tokens * float(self.sensitivity.double().mean()) * left
        return cost, found.error(rank)

    def _rows(self, delta: Tensor) -> Tensor:
        """What `delta: [N, K]` makes of the inputs, mean squares; in float64, as Grams of massive activations have eigenvalues far apart."""
        if self.gram is not None:
            wide = delta.double()
            return ((wide @ self.gram.double()) * wide).sum(1)
        stride, padding, dilation = (tuple(v) for v in conv_geometry(self.site))
        whole = Convolution(name="", weight=delta.reshape(self.site.shape).contiguous(), stride=stride, padding=padding, dilation=dilation)
        made = [run((whole,), x.float()).transpose(0, 1).flatten(1).double() for x in self.inputs]
        return torch.stack([y.square().sum(1) for y in made]).sum(0) / max(1, sum(y.shape[1] for y in made))


def matrix_of(chain: Sequence[Link], site: WeightSite) -> Tensor:
    """The matrix `[N, K]` that a chain of the site stands for: what it answers to every unit input."""
    if len(site.shape) == 2:
        return run(chain, torch.eye(site.columns)).t()
    bare = [replace(c, stride=_all(c, 1), padding=_all(c, 0), dilation=_all(c, 1)) if isinstance(c, Convolution) else c for c in chain]
    return run(bare, torch.eye(prod(site.shape[1:])).view(-1, *site.shape[1:])).flatten(1).t()


def _all(link: Convolution, value: int) -> tuple[int, ...]:
    return (value,) * len(link.stride)
