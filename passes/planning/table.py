"""Puts candidates, their errors and what they take together into a table of choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...ir.axes import analyze_axes
from ...ir.chain import Chain
from ...ir.program import Program
from ...ir.sites import WeightSite
from ..context import Context
from .amounts import NANOSECONDS, Job, chain_bytes, chain_macs, dense_chain, input_shape, narrow_job, seconds, site_macs
from .candidates import Candidate
from .choices import Kind, Option, Table, Unit, Way, combined
from .curves import Curves
from .networks import Network

Ways = dict[str, list[Way]]
Amounts = tuple[int, dict[str, list[int]]]  # of the whole program, and of every way of a place


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What is planned over: candidates by site, and networks whose width may be cut."""

    program: Program
    tried: Mapping[str, Sequence[Candidate]]
    networks: Sequence[Network]

    def sites(self) -> dict[str, WeightSite]:
        """Sites with a choice, and those of the networks, by name in graph order."""
        wanted = {*self.tried, *(s.name for n in self.networks for s in n.sites)}
        return {s.name: s for s in self.program.sites() if s.name in wanted}


def build_table(scope: Scope, curves: Curves, unit: Unit, ctx: Context) -> Table:
    """Ways for every site, options for every item, and what the whole program takes."""
    ways = _ways(scope, curves)
    total, amounts = {Unit.BYTES: _bytes, Unit.MACS: _macs, Unit.LATENCY: _latency}[unit](scope, ways, ctx)
    ways = {place: [replace(w, amount=a) for w, a in zip(found, amounts[place], strict=True)] for place, found in ways.items()}
    extra = {n.name: n.nbytes(n.group.size) - sum(s.nbytes for s in n.sites) if unit is Unit.BYTES else 0 for n in scope.networks}
    fixed = total - sum(w.amount for found in ways.values() for w in found if w.kind is Kind.DENSE) - sum(extra.values())
    return Table(unit=unit, total=total, fixed=fixed, items=tuple(tuple(options) for options in _items(scope, ways, extra)))


def _ways(scope: Scope, curves: Curves) -> Ways:
    """By place, amounts still missing: a site's first way is its weight as it is; networks have their widths only."""
    out: Ways = {}
    for name, site in scope.sites().items():
        out[name] = [Way(place=name, kind=Kind.DENSE, action="", nbytes=site.nbytes, amount=0)]
        for i, c in enumerate(scope.tried.get(name, ())):
            cost, error = float(curves.costs[name][i]), float(curves.errors[name][i])
            size = chain_bytes(_planned(c, site), site)
            out[name].append(Way(place=name, kind=c.kind, action=c.one.to_spec(), nbytes=size, amount=0, cost=cost, error=error, share=c.share))
    for network in scope.networks:
        rising = curves.scores[network.name].double().sort().values.cumsum(0)
        out[network.name] = [_slice(network, k, float(rising[network.group.size - k - 1]), curves.power[network.name]) for k in network.counts]
    return out


def _slice(network: Network, kept: int, cost: float, power: float) -> Way:
    size = network.group.size
    error = min(1.0, cost / max(power, 1e-30)) ** 0.5
    return Way(
        place=network.name,
        kind=Kind.SLICE,
        action=f"keep {kept} of {size}",
        nbytes=network.nbytes(kept),
        amount=0,
        cost=cost,
        error=error,
        share=kept / size,
    )


def _planned(candidate: Candidate, site: WeightSite) -> Chain:
    planned = candidate.one.planned_chain(site)
    assert not isinstance(planned, str)
    return planned


def _bytes(scope: Scope, ways: Ways, ctx: Context) -> Amounts:
    return scope.program.nbytes, {place: [w.nbytes for w in found] for place, found in ways.items()}


def _macs(scope: Scope, ways: Ways, ctx: Context) -> Amounts:
    analysis = analyze_axes(scope.program)
    out = {}
    for name, site in scope.sites().items():
        out[name] = [site_macs(analysis, site), *(chain_macs(_planned(c, site), site) for c in scope.tried.get(name, ()))]
    for network in scope.networks:
        whole = sum(out[s.name][0] for s in network.sites)
        out[network.name] = [whole - network.group.macs * (network.group.size - k) for k in network.counts]
    return analysis.macs(), out


def _latency(scope: Scope, ways: Ways, ctx: Context) -> Amounts:
    """Nanoseconds; where the sites alone take longer than the program (they do not run side by side there), they are scaled down to it."""
    sites = scope.sites()
    jobs: dict[str, list[Job]] = {}
    for name, site in sites.items():
        chains = [dense_chain(site), *(_planned(c, site) for c in scope.tried.get(name, ()))]
        jobs[name] = [(chain, input_shape(site), site.dtype) for chain in chains]
    for network in scope.networks:
        for site in network.sites:
            jobs[f"{network.name} {site.name}"] = [narrow_job(site, network.group.size, k, inside=site.name == network.down.site.name) for k in network.counts]
    timed = seconds(scope.program, jobs, ctx)
    for network in scope.networks:
        timed[network.name] = torch.stack([timed[f"{network.name} {s.name}"] for s in network.sites]).sum(0)
    total = float(timed["program"][0])
    scale = min(1.0, total / max(sum(float(timed[n][0]) for n in sites), 1e-12)) * NANOSECONDS
    return int(total * NANOSECONDS), {place: [int(t * scale) for t in timed[place].tolist()] for place in ways}


def _items(scope: Scope, ways: Ways, extra: Mapping[str, int]) -> list[list[Option]]:
    """A network with its sites is one item, every other site one of its own; `extra` are a network's biases, which only a slice makes smaller."""
    items, within = [], set()
    for network in scope.networks:
        sites = [s.name for s in network.sites]
        items.append([*combined([ways[s] for s in sites], extra[network.name]), *(Option(ways=(w,)) for w in ways[network.name])])
        within |= set(sites)
    return items + [[Option(ways=(w,)) for w in ways[name]] for name in scope.tried if name not in within]
