"""What layers take at each width: bytes and multiply-accumulates by arithmetic, seconds by running a layer's own operators alone at the widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from ...ir.axes import analyze_axes
from ...ir.errors import PassError
from ...ir.program import Program
from ...ir.structure import find_structure
from ..context import Context
from ..planning.amounts import NANOSECONDS, Job, narrow_job, seconds
from ..planning.networks import unit_bytes
from ..structured.groups import Group

Widths = Mapping[Group, Sequence[int]]


class Unit(Enum):
    """What a budget counts, of the whole program."""

    BYTES = "bytes"
    MACS = "macs"
    LATENCY = "latency"


def width_costs(program: Program, widths: Widths, unit: Unit, ctx: Context) -> tuple[int, dict[Group, list[int]]]:
    """The program's own amount, and that of every group at each of its widths (bytes, multiply-accumulates, or nanoseconds on the example inputs)."""
    if unit is Unit.LATENCY:
        return _latency(program, widths, ctx)
    if unit is Unit.BYTES:
        return program.nbytes, {g: [unit_bytes(g.analysis, g) * w for w in found] for g, found in widths.items()}
    return analyze_axes(program).macs(), {g: [g.macs * w for w in found] for g, found in widths.items()}


def _latency(program: Program, widths: Widths, ctx: Context) -> tuple[int, dict[Group, list[int]]]:
    sites = {f.hidden.name: (f.sites, f.down) for f in find_structure(program).feed_forwards}
    jobs: dict[str, list[Job]] = {}
    for group, found in widths.items():
        if group.name not in sites:
            raise PassError(f"search_widths: {group.name} is no feed-forward layer, whose seconds could be looked up; take unit=bytes or macs, or roles=[ffn]")
        mine, down = sites[group.name]
        for site in mine:
            jobs[f"{group.name} {site.name}"] = [narrow_job(site, group.size, w, inside=site.name == down.name) for w in found]
    timed = seconds(program, jobs, ctx)
    costs = {g: [int(NANOSECONDS * sum(float(timed[f"{g.name} {s.name}"][i]) for s in sites[g.name][0])) for i in range(len(f))] for g, f in widths.items()}
    return int(NANOSECONDS * float(timed["program"][0])), costs
