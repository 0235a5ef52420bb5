"""Fold batch normalization into the convolution or linear before it: exact up to float rounding, and one node less.

`y = (Wx + b - mean) * gamma / sqrt(var + eps) + beta` is `W' = diag(s) W`, `b' = (b - mean) * s + beta` with `s = gamma / sqrt(var + eps)`; computed in
float64. Not folded: batch norms that follow anything else, weights used twice, compressed weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.edit import Editor
from ..ir.nodes import argument, get_tensor, module_path, node_type
from ..ir.program import Program
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from .base import Decision, Guarantee, Pass, Plan, SiteResult, Skip
from .context import Context

BATCH_NORMS = {torch.ops.aten._native_batch_norm_legit_no_training.default, torch.ops.aten.batch_norm.default}


@dataclass(frozen=True, kw_only=True)
class FoldAffine(Pass):
    """Absorbs every batch norm (running statistics, evaluation mode) that directly follows a plain conv or 2-d linear site."""

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """One decision per batch norm that can be folded, one skip per batch norm that cannot."""
        sites = {s.node: s for s in program.sites()}
        decisions, skips = [], []
        for norm in batch_norms(program):
            site = sites.get(norm.args[0])  # type: ignore[arg-type]
            where = site.name if site else norm_name(norm)
            why = self.why_unnamed(where) or _why_not(program, norm, site)
            if why is None and site is not None:
                decisions.append(Decision(site=where, action=f"fold {norm_name(norm)}", bytes_before=site.nbytes, bytes_after=site.nbytes))
            else:
                skips.append(Skip(where, why or ""))
        return Plan(pass_spec=self.to_spec(), decisions=tuple(decisions), skips=tuple(skips))

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Scale weights, set biases, bypass the norms."""
        sites = {s.name: s for s in program.sites()}
        results = []
        with Editor(program, self.to_spec()) as editor:
            for decision in plan.decisions:
                site = sites[decision.site]
                norm = next(u for u in site.node.users if u.target in BATCH_NORMS)
                _fold(editor, program, site, norm)
                results.append(SiteResult(site=site.name, action=decision.action, bytes_before=site.nbytes, bytes_after=site.nbytes))
        return tuple(results)


def batch_norms(program: Program) -> list[fx.Node]:
    """Batch norms of the graph, in order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target in BATCH_NORMS]


def norm_name(norm: fx.Node) -> str:
    """Module path of a batch norm, or its node's name where it has none."""
    return module_path(norm) or norm.name


def _why_not(program: Program, norm: fx.Node, site: WeightSite | None) -> str | None:
    if site is None:
        return f"batch norm after {getattr(norm.args[0], 'name', 'a constant')}, which is no weight site"
    if site.kind not in (*CONVOLUTIONS, SiteKind.LINEAR) or site.compressed:
        return f"cannot scale a {site.kind.value} weight in {site.format.to_spec()}; fold before quantizing"
    if site.kind is SiteKind.LINEAR and _rank(site.node) != 2:
        return "batch norm over another axis than the linear's outputs"
    if len(site.node.users) != 1:
        return f"its output is also used by {', '.join(u.name for u in site.node.users if u is not norm)}"
    if site.tied:
        return f"its weight is tied to {', '.join(site.tied)}"
    if norm.target is torch.ops.aten.batch_norm.default and argument(norm, "training"):
        return "batch norm in training mode"
    if any(u.args[1] != 0 and u.users for u in norm.users if u.target.__name__ == "getitem"):  # type: ignore[union-attr]
        return "the batch norm's statistics are used elsewhere"
    return None


def _rank(node: fx.Node) -> int:
    found = node_type(node)
    return len(found.shape) if found is not None else -1


def _fold(editor: Editor, program: Program, site: WeightSite, norm: fx.Node) -> None:
    def read(name: str, default: float) -> Tensor:
        node: Any = argument(norm, name)
        return get_tensor(program.graph_module, str(node.target)).detach().double() if node is not None else torch.full((site.rows,), default).double()

    eps = argument(norm, "eps")
    scale = read("weight", 1.0) / (read("running_var", 1.0) + eps).sqrt()
    bias = site.bias_vector()
    why = f"absorbs batch norm {norm_name(norm)}"
    editor.set_matrix(site, site.matrix().double() * scale.unsqueeze(1), why)
    editor.set_bias(site, ((bias - read("running_mean", 0.0)) * scale + read("bias", 0.0)).to(site.dtype), why)
    editor.bypass(norm, site.node, f"folded into {site.name}")
