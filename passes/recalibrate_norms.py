"""Take the statistics of batch norms anew from calibration data, in order, each seeing those before it as renewed.

A compressed weight moves the mean and variance of what a batch norm sees, and its stored statistics no longer fit: the adaptive batch normalization of EagleEye
(Li et al., ECCV 2020, arXiv 2007.02491, section 3.3), without a gradient. Means and variances (unbiased, as PyTorch keeps them) are taken over all calibration
data at once in float64, not as a moving average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.edit import Editor
from ..ir.errors import CalibrationError
from ..ir.nodes import argument, get_tensor
from ..ir.program import Program
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .calibrate import CalibrationWalk
from .context import Context
from .fold_affine import batch_norms, norm_name

MEAN, VARIANCE = "running_mean", "running_var"


@dataclass(frozen=True, kw_only=True)
class RecalibrateNorms(Pass):
    """Renews every batch norm that runs on stored statistics of its own; `only` and `skip` match the norms' module paths. Run it once weights are final."""

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    uses_data: ClassVar[bool] = True

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision for each norm that can be renewed, one skip for each that cannot."""
        decisions, skips = [], []
        norms = batch_norms(program)
        for norm in norms:
            why = self.why_unnamed(norm_name(norm)) or _why_not(norm, norms)
            size = sum(get_tensor(program.graph_module, _stored(norm, w)).nbytes for w in (MEAN, VARIANCE)) if why is None else 0
            if why is None:
                decisions.append(Decision(site=norm_name(norm), action="recalibrate", bytes_before=size, bytes_after=size))
            else:
                skips.append(Skip(norm_name(norm), why))
        return Plan(pass_spec=self.to_spec(), decisions=tuple(decisions), skips=tuple(skips))

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Only values change: later passes plan the same."""

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Walk the data through the program and renew norm after norm."""
        walk = CalibrationWalk(program, ctx.calibration)
        planned = {d.site: d for d in plan.decisions}
        with Editor(program, self.to_spec()) as editor:
            return tuple(_renew(editor, program, walk, norm, planned[norm_name(norm)]) for norm in batch_norms(program) if norm_name(norm) in planned)


def _renew(editor: Editor, program: Program, walk: CalibrationWalk, norm: fx.Node, decision: Decision) -> SiteResult:
    walk.run_before(norm)
    mean, variance = moments(walk.values(norm.all_input_nodes[0]), decision.site)
    old_mean, old_variance = (get_tensor(program.graph_module, _stored(norm, w)) for w in (MEAN, VARIANCE))
    moved = (mean - old_mean.double()).square() / old_variance.double().clamp_min(torch.finfo(old_variance.dtype).tiny)
    ratio = (variance.clamp_min(1e-30) / old_variance.double().clamp_min(1e-30)).log().mean()
    facts = {"mean_moved": math.sqrt(float(moved.mean())), "variance_ratio": math.exp(float(ratio))}
    tensors = {_stored(norm, MEAN): mean.to(old_mean.dtype), _stored(norm, VARIANCE): variance.to(old_variance.dtype)}
    editor.reweight(norm, tensors, "statistics taken anew", facts)
    return SiteResult(site=decision.site, action=decision.action, bytes_before=decision.bytes_before, bytes_after=decision.bytes_after, facts=facts)


def moments(batches: Sequence[Tensor], where: str) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance `[C] float64` over everything but axis 1 of `batches`, `[B, C, ...]` each."""
    parts = [b.double().movedim(1, 0).flatten(1) for b in batches]
    count = sum(p.shape[1] for p in parts)
    if count < 2:
        raise CalibrationError(f"{where}: {count} value a channel in the calibration data; a variance takes two, so give more data")
    mean = torch.stack([p.sum(1) for p in parts]).sum(0) / count
    variance = torch.stack([(p - mean.unsqueeze(1)).square().sum(1) for p in parts]).sum(0) / (count - 1)
    if not bool(torch.isfinite(variance).all()):
        raise CalibrationError(f"{where}: statistics are not finite: the model overflows on the calibration data; check the batches or use fp32")
    return mean, variance


def _stored(norm: fx.Node, which: str) -> str:
    node: Any = argument(norm, which)
    return str(node.target)


def _why_not(norm: fx.Node, norms: list[fx.Node]) -> str | None:
    if norm.target is torch.ops.aten.batch_norm.default and argument(norm, "training"):
        return "it takes statistics of each batch"
    if any(argument(norm, w) is None for w in (MEAN, VARIANCE)):
        return "it stores no statistics"
    if sum(argument(n, MEAN) is argument(norm, MEAN) for n in norms) > 1:
        return "its statistics serve several places, which see different data"
    return None
