"""What ways to hold a weight take: bytes and multiply-accumulates by arithmetic, seconds by running a site's operators alone on example-sized inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...ir.axes import AxisAnalysis, hint, kept_size
from ...ir.chain import Chain, Convolution, Link, Product, calls, parameters, run, to_json
from ...ir.program import Program
from ...ir.site_calls import conv_geometry
from ...ir.sites import CONVOLUTIONS, WeightSite
from ..context import Context
from ..devices import waiting_for
from ..memory import Tensors, remembered

ROUNDS, WARMUP = 9, 2
TRIALS = 6  # choices that are measured in the whole program
NEAR = 0.97  # of the budget: near enough
NANOSECONDS = 1e9


def chain_bytes(chain: Sequence[Link], site: WeightSite) -> int:
    """Bytes of the factors."""
    return parameters(chain) * site.dtype.itemsize


def site_macs(analysis: AxisAnalysis, site: WeightSite) -> int:
    """Multiply-accumulates of the site in one run on the example inputs."""
    return kept_size(analysis.work[site.node], {})


def chain_macs(chain: Sequence[Link], site: WeightSite) -> int:
    """Multiply-accumulates of the chain in one run on the example inputs: each link counts where it runs (a first 1x1 at the input's resolution)."""
    x, total = torch.empty(input_shape(site), device="meta"), 0
    for link, _ in calls(chain, None):
        target, args = link.call(x, _on(link, "meta"), None)
        x = target(*args)
        if isinstance(link, (Product, Convolution)):
            total += x.numel() * (link.weight.numel() // len(link.weight))
    return total


def _on(link: Link, device: str) -> Tensor | None:
    return link.weight.to(device) if isinstance(link, (Product, Convolution)) else None


def input_shape(site: WeightSite) -> tuple[int, ...]:
    """Sizes of what the site sees on the example inputs."""
    return tuple(hint(s) for s in site.data.meta["val"].shape)


def dense_chain(site: WeightSite, rows: int | None = None, columns: int | None = None) -> Chain:
    """The site's own operator as a chain, its weight without data; a linear perhaps of other sizes."""
    if site.kind not in CONVOLUTIONS:
        return (Product(name="dense", weight=torch.empty(rows or site.rows, columns or site.columns, device="meta")),)
    stride, padding, dilation = (tuple(v) for v in conv_geometry(site))
    weight = torch.empty(site.shape, device="meta")
    return (Convolution(name="dense", weight=weight, stride=stride, padding=padding, dilation=dilation, groups=site.groups),)


Job = tuple[Chain, tuple[int, ...], torch.dtype]  # a chain, the shape of its input, the type of both


def narrow_job(site: WeightSite, size: int, width: int, *, inside: bool) -> Job:
    """A linear's own operator with `width` of `size` units among its inputs (`inside`) or its outputs."""
    *before, columns = input_shape(site)
    if inside:
        return dense_chain(site, columns=site.columns * width // size), (*before, columns * width // size), site.dtype
    return dense_chain(site, rows=site.rows * width // size), (*before, columns), site.dtype


def seconds(program: Program, jobs: Mapping[str, Sequence[Job]], ctx: Context) -> Tensors:
    """By name the seconds of each of its chains, `[jobs] f64`, and of one run of the program (`program`), medians of runs in turn. Remembered over the run.

    Chains of the same sizes on inputs of the same size are timed once.
    """

    def compute() -> Tensors:
        from ...runtime.latency import latency

        wait = waiting_for(program)
        whole = latency({"program": program.run_examples}, rounds=ROUNDS, warmup=WARMUP, synchronize=wait)["program"].seconds.median
        known: dict[str, float] = {}
        for mine in ctx.track(list(jobs.values()), "timing candidates"):
            fresh = {key(job): job for job in mine if key(job) not in known}
            timed = latency({k: _runner(job) for k, job in fresh.items()}, rounds=ROUNDS, warmup=WARMUP, synchronize=wait).timings if fresh else ()
            known |= {t.name: t.seconds.median for t in timed}
        out = {f"site {name}": torch.tensor([known[key(job)] for job in mine], dtype=torch.float64) for name, mine in jobs.items()}
        return out | {"program": torch.tensor([whole], dtype=torch.float64)}

    found = remembered(ctx, "factorization-seconds", sorted({key(job) for mine in jobs.values() for job in mine}), program, compute)
    return {name: found[f"site {name}"] for name in jobs} | {"program": found["program"]}


def key(job: Job) -> str:
    """Equal for jobs that take the same time."""
    chain, shape, dtype = job
    sizes = [list(link.weight.shape) for link in chain if isinstance(link, (Product, Convolution))]
    return f"{to_json(chain)} {sizes} {list(shape)} {dtype}"


def _runner(job: Job) -> Callable[[], Any]:
    chain, shape, dtype = job
    filled = filled_chain(chain, dtype)
    x = _drawn(shape, torch.Generator().manual_seed(0), dtype)

    def call() -> Tensor:
        with torch.no_grad():
            return run(filled, x)

    return call


def filled_chain(chain: Sequence[Link], dtype: torch.dtype) -> Chain:
    """The chain with small random weights where it has none."""
    generator = torch.Generator().manual_seed(0)

    def fill(link: Link) -> Link:
        if not isinstance(link, (Product, Convolution)):
            return link
        shape = link.weight.shape
        return replace(link, weight=_drawn(shape, generator, dtype) / max(1, prod(shape[1:])) ** 0.5)

    return tuple(fill(link) for link in chain)


def _drawn(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)


def share_of(program: Program, other: Program) -> float:
    """Time of one run of `other` on the example inputs over that of `program`, medians of runs in turn."""
    from ...runtime.latency import latency

    calls = {"program": program.run_examples, "other": other.run_examples}
    return latency(calls, rounds=ROUNDS, warmup=WARMUP, synchronize=waiting_for(program))["other"].ratio.median


def met(measured: Callable[[float], float], budget: float, floor: float) -> float:
    """The largest aim tried, from `floor` to 1, whose measured share is within the budget; where none was, the one that came nearest.

    The share should rise with the aim: each trial scales the aim by what was missed, then halves the bracket.
    """
    aim, low, high = max(budget, floor), floor, 1.0
    tried: list[tuple[float, float]] = []
    for _ in range(TRIALS):
        share = measured(aim)
        tried.append((aim, share))
        low, high = (max(low, aim), high) if share <= budget else (low, min(high, aim))
        if NEAR * budget <= share <= budget or high - low < 1e-3:
            break
        guess = aim * (1 + NEAR) / 2 * budget / share
        aim = guess if low < guess < high else (low + high) / 2
    within = [t for t in tried if t[1] <= budget]
    return max(within)[0] if within else min(tried, key=lambda t: t[1])[0]
