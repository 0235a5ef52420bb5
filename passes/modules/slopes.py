"""How hard the loss presses on modules: squared gradients at their outputs, and at what every pair of query-key channels adds to the scores.

With d_n = E[(dL/dy_n)^2] an output error e becomes an estimated rise of the loss, `sum_n d_n E[e_n^2]`. A pair of channels that goes missing changes the
queries by q_p: its part of the loss is E[(dL/dq_p . q_p)^2], to the same order; a rotary embedding cannot change the product. The same holds for the keys,
and the mean of both views is taken. (The use of gradients in modular decomposition is ours; the weighting of outputs is that of importance `obs_fisher`.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir.nodes import get_tensor
from ...ir.program import Program
from ...ir.sites import WeightSite
from ..context import Context
from ..gradients import Gradients
from ..memory import Tensors
from ..sensitivities import slope_rows
from .finding import Module, Part


def output_key(module: Module) -> str:
    """Name of `[N]`: mean squared gradients of the module's outputs."""
    return f"outputs of {module.name}"


def pair_key(module: Module) -> str:
    """Name of `[H, size]`: the pressure on every query-key channel or rotary pair of every key head."""
    return f"pairs of {module.name}"


def module_slopes(program: Program, modules: Sequence[Module], ctx: Context) -> Tensors:
    """Both, float64, from one sweep of gradients over the calibration data."""
    found: Tensors = {}
    seen: dict[str, int] = {}
    by_site: dict[str, list[Module]] = {}
    for module in modules:
        sites = (module.attention.q, module.attention.k) if module.part is Part.QUERY_KEY else (module.output,)
        for site in dict.fromkeys(s for s in sites if s is not None):
            by_site.setdefault(site.name, []).append(module)

    def visit(site: WeightSite, x: Tensor, slope: Tensor) -> None:
        rows = (slope_rows(site, slope).float() * len(slope)).flatten(0, 1)
        seen[site.name] = seen.get(site.name, 0) + len(rows)
        for module in by_site[site.name]:
            if module.part is Part.QUERY_KEY:
                _add(found, pair_key(module), _pair_pressure(program, module, site, x, rows))
            else:
                _add(found, output_key(module), rows.square().sum(0).double())

    Gradients(program, [s for s in program.sites() if s.name in by_site], ctx).visit(visit, "pressure on modules")
    for module in modules:
        key = pair_key(module) if module.part is Part.QUERY_KEY else output_key(module)
        first = module.attention.q if module.part is Part.QUERY_KEY else module.output
        assert first is not None
        found[key] = found[key] / max(1, seen.get(first.name, 0)) if key in found else torch.ones(_shape(module), dtype=torch.float64)
    return found


def _shape(module: Module) -> tuple[int, ...]:
    """What stands for a module whose output does not reach the loss: ones."""
    if module.part is Part.QUERY_KEY:
        assert module.heads is not None
        return module.heads.count, module.axis.size
    return (module.output.rows,)


def _pair_pressure(program: Program, module: Module, site: WeightSite, x: Tensor, rows: Tensor) -> Tensor:
    """Half of `sum over tokens (and query heads) of (slope . value)^2` of every pair, `[H, size]`; both halves when one site makes queries and keys."""
    heads, total = module.heads, torch.zeros(())
    assert heads is not None
    bias = None if site.bias is None else get_tensor(program.graph_module, site.bias).detach().float()
    product = rows * torch.nn.functional.linear(x.reshape(-1, x.shape[-1]).float(), site.matrix().float(), bias)
    if site == heads.attention.q:
        total = total + product[:, heads.query_rows(module.axis)].sum(-1).square().sum((0, 2))
    if site == heads.attention.k:
        total = total + product[:, heads.key_rows(module.axis)].sum(-1).square().sum(0)
    return 0.5 * total.double()


def _add(found: Tensors, key: str, part: Tensor) -> None:
    found[key] = found[key] + part if key in found else part
