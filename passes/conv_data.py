"""What a convolution sees of its data, without the Gram of its patches, whose side is channels times positions: 65,536 for 1024 channels under 64 taps.

Channels and positions get a Gram each, as if the patches' Gram were their Kronecker product; the last factor of a chain, which is linear in everything before
it, is fitted to the data itself. Both are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir.chain import Chain, Convolution, run
from ..ir.site_calls import conv_geometry
from ..ir.sites import WeightSite
from .relative import relative_error

WIDEST = 2048  # inputs of a last factor that is still fitted: its solves are cubic in them
ROWS = 2**14  # of the last factor's inputs, and places of the data, beyond which whole images are left out, evenly
PATCHES = 2**22  # of one channel, as above
DAMPINGS = (1e-6, 1e-4, 1e-2, 1e-1)  # of the mean diagonal


@dataclass(frozen=True)
class ConvData:
    """`inputs`: what an ungrouped convolution reads, `[B, C, *spatial]` each."""

    site: WeightSite
    inputs: Sequence[Tensor]

    def _sample(self, rows_each: int, rows: int) -> list[Tensor]:
        """Every n-th image of the inputs, so that there are no more than so many rows, of `rows_each` an image."""
        images = sum(len(x) for x in self.inputs)
        step, start, found = max(1, -(-images * rows_each // rows)), 0, []
        for x in self.inputs:
            part = x[-start % step :: step].float()
            start += len(x)
            found += [part] if len(part) else []
        return found

    def channels(self) -> Tensor:
        """Mean of `x x^T` over patches and their positions, `[C, C] f64`."""
        total, count = torch.zeros(self.site.shape[1], self.site.shape[1], dtype=torch.float64), 0
        for x in self._sample(prod(self.inputs[0].shape[2:]), 2 * ROWS):
            seen, patches = self._visits(x)
            flat = x.transpose(0, 1).flatten(1)  # [C, B * spatial]
            total += ((flat * seen.flatten().repeat(len(x))) @ flat.t()).double()
            count += patches * len(x)
        return total / max(count, 1)

    def positions(self) -> Tensor:
        """Mean of `x x^T` over patches and their channels, `[P, P] f64`."""
        total, count = torch.zeros(prod(self.site.shape[2:]), prod(self.site.shape[2:]), dtype=torch.float64), 0
        for x in self._sample(self.site.shape[1] * prod(self.inputs[0].shape[2:]), PATCHES):
            for part in x.split(max(1, 2**22 // (x[0].numel() * len(total)))):
                patches = self._patches(part.flatten(0, 1).unsqueeze(1))
                total += (patches.t() @ patches).double()
                count += len(patches)
        return total / max(count, 1)

    def fitted(self, chain: Chain, matrix: Tensor) -> tuple[Chain, float]:
        """The chain with its last factor fitted to what `matrix: [F, C P]` makes of the data, and the relative error of the chain's outputs.

        Least squares, damped towards the factor as it is; how much, the other half of the data says. A factor of more than `WIDEST` inputs stays as it is.
        """
        place = max(i for i, link in enumerate(chain) if isinstance(link, Convolution))
        last = chain[place]
        assert isinstance(last, Convolution)
        old = last.weight.flatten(1).double()
        sample = self._sample(prod(self._outputs(self.inputs[0][:1].float(), matrix).shape[2:]), ROWS)
        if old.shape[1] > WIDEST:
            return chain, self._error(chain, matrix, sample)
        halves = _Moments(last), _Moments(last)
        for number, x in enumerate(sample):
            for part, half in zip(x.tensor_split(2), halves[:: 1 if number % 2 == 0 else -1], strict=True):
                if len(part):
                    half.add(run(chain[:place], part), self._outputs(part, matrix))
        both, new = halves[0] + halves[1], old
        if all(h.rows for h in halves):
            best = min(DAMPINGS, key=lambda d: halves[1].error(halves[0].solved(old, d)) + halves[0].error(halves[1].solved(old, d)))
            new = min((both.solved(old, best), old), key=both.error)
        return (*chain[:place], replace(last, weight=new.float().reshape(last.weight.shape)), *chain[place + 1 :]), both.error(new)

    def _error(self, chain: Chain, matrix: Tensor, sample: Sequence[Tensor]) -> float:
        left, power = 0.0, 0.0
        for x in sample:
            wanted = self._outputs(x, matrix)
            left += float((run(chain, x) - wanted).double().square().sum())
            power += float(wanted.double().square().sum())
        return relative_error(left, power)

    def _outputs(self, x: Tensor, matrix: Tensor) -> Tensor:
        stride, padding, dilation = conv_geometry(self.site)
        whole = Convolution(name="", weight=matrix.view(self.site.shape), stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))
        return run((whole,), x)

    def _patches(self, images: Tensor) -> Tensor:
        """Patches `[T, P]` of one-channel images `[B, 1, *spatial]`."""
        stride, padding, dilation = (tuple(v) if len(v) == 2 else (v[0], neutral) for v, neutral in zip(conv_geometry(self.site), (1, 0, 1), strict=True))
        images = images if images.dim() == 4 else images.unsqueeze(-1)
        kernel = (*self.site.shape[2:], 1)[:2]
        return F.unfold(images, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2).flatten(0, 1)

    def _visits(self, x: Tensor) -> tuple[Tensor, int]:
        """In how many patches each place of an image is, `[*spatial]`, and how many positions all patches of an image have, padding included."""
        with torch.enable_grad():
            place = torch.ones(1, 1, *x.shape[2:], requires_grad=True)
            patches = self._patches(place)
            (seen,) = torch.autograd.grad(patches.sum(), place)
        return seen[0, 0], patches.numel()


class _Moments:
    """Second moments of a last factor's inputs `z: [T, K]` and wanted outputs `y: [T, F]`."""

    def __init__(self, last: Convolution) -> None:
        self.last, self.rows, self.power = last, 0, 0.0
        rows, columns = len(last.weight), last.weight[0].numel()
        self.gram = torch.zeros(columns, columns, dtype=torch.float64)
        self.cross = torch.zeros(rows, columns, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Fold in what the factor reads, and what it should make of it."""
        kernel = self.last.weight.shape[2:]
        z = inputs.transpose(0, 1).flatten(1) if prod(kernel) == 1 else F.unfold(inputs, kernel).transpose(0, 1).flatten(1)
        y = outputs.transpose(0, 1).flatten(1)
        self.gram += (z @ z.t()).double()
        self.cross += (y @ z.t()).double()
        self.power += float(y.double().square().sum())
        self.rows += z.shape[1]

    def __add__(self, other: _Moments) -> _Moments:
        """Both together."""
        total = _Moments(self.last)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        total.rows, total.power = self.rows + other.rows, self.power + other.power
        return total

    def solved(self, old: Tensor, damping: float) -> Tensor:
        """The factor of least squares, damped towards `old: [F, K]`, by more where rounding leaves the moments indefinite."""
        amount, eye = max(damping * float(self.gram.diagonal().mean()), 1e-30), torch.eye(len(self.gram), dtype=torch.float64)
        for _ in range(10):
            lower, failed = torch.linalg.cholesky_ex(self.gram + amount * eye)
            if not int(failed):
                return torch.cholesky_solve((self.cross + amount * old).t(), lower).t()
            amount *= 10
        return old

    def error(self, factor: Tensor) -> float:
        """Relative error of the outputs."""
        left = self.power - 2 * float((factor * self.cross).sum()) + float(((factor @ self.gram) * factor).sum())
        return relative_error(left, self.power)
