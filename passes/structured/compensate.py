"""Let the consumers of pruned structures make up for them: by a bias, or by new weights on what stays.

`bias` (FLAP, arXiv 2312.11983, equation 6): `b += W_R E[x_R]` for the removed columns `R`. `weights`: the ridge regression
`W'_P = (W C_:P + l W_P) (C_PP + l)^-1`, `b' = b + (W - W') E[x]` with the covariance `C`, under the inputs of the model as pruned so far. The ridge `l`
pulls towards the weights as they are; it is chosen for every consumer by two-fold cross-validation on the calibration rows, plain removal being one of the
choices: with few rows a least-squares fit that looks better on them is worse on others (SmolLM2, 25 % of FFN units, 3,072 tokens, l = 0.001: perplexity 50.9,
plain removal 38.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ...ir.edit import Editor
from ...ir.sites import SiteKind, WeightSite
from ..base import Need
from ..calibrate import Statistics
from ..context import Context
from ..relative import relative_error
from .groups import Group
from .obs import damped
from .scores import watch

RIDGES = (float("inf"), 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # shares of the mean variance; infinite: the weights stay as they are


class Compensation(Enum):
    """What the consumers may change."""

    AUTO = "auto"  # weights when the run has calibration data, else off
    OFF = "off"
    BIAS = "bias"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Moments:
    """Mean `[K]` and covariance `[K, K]` of the inputs; a site that takes no bias has a zero mean and the second moment instead."""

    mean: Tensor
    covariance: Tensor

    def error(self, lost: Tensor, shift: Tensor) -> float:
        """`E ||lost x - shift||^2`."""
        return float((lost @ self.covariance * lost).sum() + (lost @ self.mean - shift).square().sum())


def compensate(editor: Editor, kept: Mapping[Group, Tensor], how: Compensation, ctx: Context) -> dict[str, float]:
    """Zero the columns that will go at every consumer, in graph order, and let the rest make up. Returns each consumer's relative output error."""
    need = Need.MEAN | (Need.GRAM if how is Compensation.WEIGHTS else Need.MEAN_SQUARE)
    errors = {}
    for consumer, groups, parts in watch(editor.program, list(kept), need, ctx, f"compensating ({how.value})", folds=2):
        stays = torch.ones(consumer.site.columns, dtype=torch.bool)
        for group in groups:
            owner = consumer.columns(group.axis)
            stays &= (owner < 0) | torch.isin(owner, kept[group])
        if not bool(stays.all()) and why_not(consumer.site) is None:
            errors[consumer.site.name] = _apply(editor, consumer.site, stays, parts)
    return errors


def why_not(site: WeightSite) -> str | None:
    """Reason why a consumer is left as it is, or None."""
    if site.groups > 1:
        return "a grouped convolution"
    if site.tied:
        return f"its weight is tied to {', '.join(site.tied)}"
    return None


def _apply(editor: Editor, site: WeightSite, stays: Tensor, parts: Sequence[Statistics]) -> float:
    """Set weight and bias; statistics without a Gram allow a bias only."""
    weight, biased = site.matrix().double(), site.kind is not SiteKind.MM
    folds = [_moments(p, biased) for p in parts]
    whole = _pooled(folds, [p.tokens for p in parts])
    ridge = choose_ridge(weight, folds, stays) if parts[0].gram is not None else float("inf")
    new = refit(weight, whole.covariance, stays, ridge)
    lost = weight - new
    shift = lost @ whole.mean
    if biased:
        editor.set_bias(site, (site.bias_vector() + shift).to(site.dtype), "what removed inputs added on average")
    editor.set_matrix(site, new.to(site.dtype), "removed inputs zeroed, the others make up for them", {"ridge": ridge})
    power = whole.error(weight, torch.zeros_like(shift))
    return relative_error(whole.error(lost, shift), power)


def _moments(part: Statistics, biased: bool) -> Moments:
    assert part.mean is not None
    mean = part.mean[0].double()
    if part.gram is not None:
        second = part.gram[0].double()
    else:
        assert part.mean_square is not None
        second = torch.diag(part.mean_square[0].double() - mean.square()) + torch.outer(mean, mean)
    return Moments(mean, second - torch.outer(mean, mean)) if biased else Moments(torch.zeros_like(mean), second)


def _pooled(folds: Sequence[Moments], tokens: Sequence[int]) -> Moments:
    """Moments of all rows together."""
    shares = [t / sum(tokens) for t in tokens]
    mean = torch.stack([s * f.mean for s, f in zip(shares, folds, strict=True)]).sum(0)
    second = torch.stack([s * (f.covariance + torch.outer(f.mean, f.mean)) for s, f in zip(shares, folds, strict=True)]).sum(0)
    return Moments(mean, second - torch.outer(mean, mean))


def choose_ridge(weight: Tensor, folds: Sequence[Moments], stays: Tensor) -> float:
    """The ridge whose fit on either half of the rows leaves the smallest error on the other half, from no fit downwards while it falls; in float32."""
    weight = weight.float()
    folds = [Moments(f.mean.float(), f.covariance.float()) for f in folds]

    def held_out(ridge: float) -> float:
        total = 0.0
        for fitted, judged in (folds, folds[::-1]):
            lost = weight - refit(weight, fitted.covariance, stays, ridge)
            total += judged.error(lost, lost @ fitted.mean)
        return total if total >= 0 else float("inf")  # below 0: noise of moments that cancel

    return least_ridge(held_out)


def least_ridge(held_out: Callable[[float], float]) -> float:
    """The ridge of least error, from no fit downwards while it falls."""
    best, lowest = RIDGES[0], held_out(RIDGES[0])
    for ridge in RIDGES[1:]:
        error = held_out(ridge)
        if error >= lowest:
            break
        best, lowest = ridge, error
    return best


def refit(weight: Tensor, covariance: Tensor, stays: Tensor, ridge: float) -> Tensor:
    """`[N, K]`: the weight on the columns that stay whose outputs are nearest to the full weight's; zero elsewhere."""
    if ridge == float("inf"):
        return weight * stays
    keep = stays.nonzero().flatten()
    hessian = damped(covariance, ridge)
    factor, broken = torch.linalg.cholesky_ex(hessian[keep][:, keep])
    if int(broken):
        return weight * stays
    new = torch.zeros_like(weight)
    new[:, keep] = torch.cholesky_solve(hessian[keep] @ weight.t(), factor).t()
    return new
