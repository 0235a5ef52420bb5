"""Errors of everything that could be chosen, from one calibration walk over the program as it stands: costs, relative errors, and scores of hidden units.

One decomposition of a site serves the pairs of all ranks. Cores of the two-site family get a few rounds of refinement, first at one bond: where a member loses
there to the pair of as many weights by more than `LOST`, its other bonds are not tried, because at equal weights it also takes more arithmetic. CP gets one
start and few sweeps. What is chosen is then fitted in full, so predictions of these two are somewhat too high.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf
from operator import or_

import torch
from torch import Tensor

from ...ir.chain import parameters
from ...ir.errors import PassError
from ...ir.program import Program
from ...ir.sites import CONVOLUTIONS, WeightSite
from ..base import Need
from ..calibrate import CalibrationWalk, Statistics, site_groups
from ..context import Context
from ..factorize_cp import FactorizeCp
from ..factorize_mpo import FactorizeMpo
from ..factorize_svd import FactorizeSvd
from ..factorizing import Factorization
from ..kronecker_fit import whitening
from ..kronecker_sum import family, fit
from ..memory import Tensors, remembered
from ..spectra import Spectrum
from ..structured.obs import obs_scores
from ..structured.sensitivity import output_sensitivity
from ..threads import one_thread
from .candidates import Candidate
from .judge import Judge, matrix_of
from .networks import Network

KEPT = ("cost", "error", "scores", "power", "sensitivity")
ROUNDS = 3  # of refinement, for a curve
LOST = 1.5  # times the pair's cost
CP_SWEEPS = 30
WHOLE = 2048  # columns up to which a convolution's Gram is formed though no candidate needs it
Found = tuple[float, float]  # cost and relative output error


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Errors by name: `costs` and relative `errors` of a site's candidates in their order, `[candidates] f64`, and the `sensitivity: [N]` of its outputs.

    `scores: [size]` of a network's hidden units, and its `power`, the cost of losing all of its output.
    """

    costs: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    power: Mapping[str, float]
    sensitivity: Mapping[str, Tensor]


def error_curves(program: Program, tried: Mapping[str, Sequence[Candidate]], networks: Sequence[Network], weighted: bool, ctx: Context) -> Curves:
    """Curves of the sites in `tried` and of the networks; `weighted` by the sensitivity of outputs, or as relative errors. Remembered over the run."""
    downs = {n.down.site.name: n for n in networks}
    sites = [s for s in program.sites() if s.name in tried or s.name in downs]
    _refuse_unknown(sites)
    specs = hashlib.sha256("\n".join(f"{n} {c.one.to_spec()}" for n, found in tried.items() for c in found).encode()).hexdigest()[:12]

    def compute() -> Tensors:
        if not sites:
            return {}
        sensitivity = output_sensitivity(program, sites, ctx) if weighted else {}
        out = {f"sensitivity {n}": s for n, s in sensitivity.items()}
        walk = CalibrationWalk(program, ctx.calibration)
        for group in ctx.track(site_groups(sites), "error curves"):
            statistics = walk.statistics(group, _needs(group, tried))
            for site in group:
                with one_thread():
                    out |= _of_site(site, tried.get(site.name, ()), downs.get(site.name), statistics, sensitivity.get(site.name))
        return out

    found = remembered(ctx, f"factorization-curves-{specs}-{'loss' if weighted else 'output'}", [*tried, *(n.name for n in networks)], program, compute)
    parts = {word: {k.removeprefix(f"{word} "): t for k, t in found.items() if k.startswith(f"{word} ")} for word in KEPT}
    power = {name: float(t) for name, t in parts["power"].items()}
    return Curves(costs=parts["cost"], errors=parts["error"], scores=parts["scores"], power=power, sensitivity=parts["sensitivity"])


def _refuse_unknown(sites: Sequence[WeightSite]) -> None:
    unknown = next((s for s in sites if s.matrix().is_meta), None)
    if unknown is not None:
        raise PassError(
            f"plan_factorization: the values of {unknown.name} are known only once an earlier pass of the recipe has run; put the planner before it"
        )


def _needs(group: Sequence[WeightSite], tried: Mapping[str, Sequence[Candidate]]) -> Need:
    """What the candidates ask for, and what judges them; Fisher information is replaced by sensitivities."""
    asked = reduce(or_, (c.one.needs for s in group for c in tried.get(s.name, ())), Need.NONE) & ~Need.FISHER
    wide = group[0].kind in CONVOLUTIONS and group[0].columns > WHOLE
    return asked if wide and Need.INPUTS in asked else asked | Need.GRAM


def seen_by(one: Factorization, site: WeightSite, statistics: Statistics) -> Statistics:
    """What a factorization would see by itself: without a wide convolution's Gram that only others asked for."""
    return statistics if Need.GRAM in one.needs or site.columns <= WHOLE else replace(statistics, gram=None)


def _of_site(site: WeightSite, tried: Sequence[Candidate], network: Network | None, statistics: Statistics, sensitivity: Tensor | None) -> Tensors:
    gram = statistics.gram[0] if statistics.gram is not None else None
    judge = Judge(site=site, tokens=_rows(site, statistics), gram=gram, inputs=statistics.inputs, sensitivity=sensitivity)
    out: Tensors = {}
    if tried:
        found = judged(site, tried, judge, statistics)
        out = {f"cost {site.name}": torch.tensor([c for c, _ in found]).double(), f"error {site.name}": torch.tensor([e for _, e in found]).double()}
    if network is not None:
        out[f"scores {network.name}"] = obs_scores(network.down, [network.group], statistics, sensitivity)[network.group]
        out[f"power {network.name}"] = torch.tensor(judge.approximation(torch.zeros_like(judge.matrix))[0]).double()
    return out


def _rows(site: WeightSite, statistics: Statistics) -> int:
    """Rows that the site sees over the calibration data."""
    if statistics.tokens:
        return statistics.tokens
    return sum(len(x) for x in statistics.inputs) * int(site.node.meta["val"].shape[2:].numel())


def judged(site: WeightSite, tried: Sequence[Candidate], judge: Judge, statistics: Statistics) -> list[Found]:
    """Cost and relative error of every candidate, in order; infinite for bonds that are not tried."""
    found = judge.spectrum() if any(isinstance(c.one, FactorizeSvd) for c in tried) else None
    out: dict[str, Found] = {}
    for candidate in tried:
        one = candidate.one
        if isinstance(one, FactorizeSvd) and found is not None:
            out[one.to_spec()] = judge.pair(found, one.rank or 0)
        elif not isinstance(one, FactorizeMpo):
            quick = replace(one, starts=1, sweeps=CP_SWEEPS) if isinstance(one, FactorizeCp) else one
            chain, _ = quick.chain(site, judge.matrix, seen_by(one, site, statistics))
            out[one.to_spec()] = (inf, 1.0) if isinstance(chain, str) else judge.approximation(matrix_of(chain, site))
    members = [c.one for c in tried if isinstance(c.one, FactorizeMpo)]
    for t in dict.fromkeys(one.family or 1 for one in members):
        out |= _bonds(site, [one for one in members if (one.family or 1) == t], judge, found)
    return [out[c.one.to_spec()] for c in tried]


def _bonds(site: WeightSite, members: Sequence[FactorizeMpo], judge: Judge, pairs: Spectrum | None) -> dict[str, Found]:
    """One member of the family at all its bonds, the middle one first."""
    assert judge.gram is not None
    modes = family(site.rows, site.columns, members[0].family or 1)
    white, out = whitening(judge.gram, modes), {one.to_spec(): (inf, 1.0) for one in members}
    middle = members[len(members) // 2]
    for one in (middle, *(m for m in members if m is not middle)):
        cores, _ = fit(judge.matrix, modes, one.chi or 1, judge.gram, ROUNDS, white)
        out[one.to_spec()] = judge.approximation(cores.matrix())
        if one is middle and pairs is not None and out[one.to_spec()][0] > LOST * judge.pair(pairs, _rank(site, one))[0]:
            break
    return out


def _rank(site: WeightSite, one: FactorizeMpo) -> int:
    """Of the pair that holds as many weights."""
    planned = one.planned_chain(site)
    return 0 if isinstance(planned, str) else parameters(planned) // (site.rows + site.columns)
