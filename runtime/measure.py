"""What a program costs and how far it is from another: bytes, bits per weight, error, latency, language-model quality.

Language models are in `language`, timing in `latency`; everything can be imported from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..ir.errors import CalibrationError
from ..ir.nodes import get_tensor
from ..ir.program import Program
from ..ir.sites import SiteKind, WeightSite
from ..ir.weights import storage_key
from ..passes.calibrate import as_calls
from ..passes.context import Call
from .language import LogitComparison, Perplexity, compare_logits, greedy_sample, logits_of, perplexity
from .latency import Latency, Spread, Timing, latency
from .measurement import Measurement

__all__ = [
    "Latency", "LogitComparison", "Measurement", "Parity", "Perplexity", "Size", "Spread", "Timing",
    "bits_per_weight", "compare_logits", "greedy_sample", "latency", "logits_of", "measure_size", "parity", "perplexity",
]  # fmt: skip

LINEAR_KINDS = frozenset({SiteKind.LINEAR, SiteKind.ADDMM, SiteKind.MM})
CHUNK = 1 << 22  # elements compared at a time, in float64


@dataclass(frozen=True, kw_only=True)
class Size(Measurement):
    """Bytes of a program, and the bits its weights take.

    `nbytes`: everything stored. `parts`: bytes of the weight sites by payload part (`codes`, `scale`, `values`, ...); `other_bytes`: biases, norms, tables.
    `weights`, `linear_weights`: how many weights the sites stand for. `bits_per_weight` counts all payload parts with their padding, over all sites;
    `linear_bits_per_weight` over linear, addmm and mm sites only, the output head among them. Storage that sites share counts once.
    """

    nbytes: int
    other_bytes: int
    parts: Mapping[str, int]
    weights: int
    linear_weights: int
    bits_per_weight: float
    linear_bits_per_weight: float


def measure_size(program: Program) -> Size:
    """Sizes of a program; bits per weight are NaN where there is no such site."""
    sites = program.sites()
    linear = [s for s in sites if s.kind in LINEAR_KINDS]
    parts = _part_bytes(sites)
    return Size(
        nbytes=program.nbytes,
        other_bytes=program.nbytes - sum(parts.values()),
        parts=parts,
        weights=_weights(sites),
        linear_weights=_weights(linear),
        bits_per_weight=_bits(sites),
        linear_bits_per_weight=_bits(linear),
    )


def bits_per_weight(program: Program, select: Callable[[WeightSite], bool] = lambda site: True) -> float:
    """Stored bits per weight over the sites that `select` takes, everything counted, shared storage once; NaN when it takes none."""
    return _bits([s for s in program.sites() if select(s)])


def _bits(sites: Iterable[WeightSite]) -> float:
    sites = list(sites)
    return 8 * sum(_part_bytes(sites).values()) / _weights(sites) if sites else math.nan


def _part_bytes(sites: Iterable[WeightSite]) -> dict[str, int]:
    """Bytes by payload part, each storage once."""
    seen: set[tuple[int, int]] = set()
    parts: dict[str, int] = {}
    for site in sites:
        for part, tensor in _stored(site).items():
            if storage_key(tensor) not in seen:
                seen.add(storage_key(tensor))
                parts[part] = parts.get(part, 0) + tensor.untyped_storage().nbytes()
    return parts


def _stored(site: WeightSite) -> dict[str, Tensor]:
    module = site.node.graph.owning_module
    assert module is not None
    return site.payload() if site.compressed else {"values": get_tensor(module, site.tensors[0])}


def _weights(sites: Iterable[WeightSite]) -> int:
    """Weights the sites stand for; sites that read one tensor count once."""
    return sum({storage_key(next(iter(_stored(s).values()))): s.parameters for s in sites}.values())


@dataclass(frozen=True, kw_only=True)
class Parity(Measurement):
    """Distance between the outputs of two programs over some batches.

    `max_abs_error`: largest difference of two elements. `max_rel_error`: that difference over the reference's largest magnitude, per output tensor, the largest
    of them. A NaN or infinity in one output only counts as an infinite error. `elements`: how many were compared.
    """

    max_abs_error: float
    max_rel_error: float
    elements: int


def parity(reference: Program, candidate: Program, batches: Iterable[object] | None = None) -> Parity:
    """Compare outputs on `batches` (each like the reference's example inputs; none: the examples themselves, caches left out).

    Caches that the candidate returns narrower are not compared.
    """
    calls = as_calls(batches, reference.inputs) if batches is not None else [reference.inputs.start]
    absolute = relative = 0.0
    elements = 0
    for call in calls:
        for a, b in _output_pairs(*_returned(reference, candidate, call)):
            error, scale = _distance(a, b)
            absolute, elements = max(absolute, error), elements + a.numel()
            relative = max(relative, error / scale if scale else (0.0 if error == 0 else math.inf))
    return Parity(max_abs_error=absolute, max_rel_error=relative, elements=elements)


def _returned(reference: Program, candidate: Program, call: Call) -> tuple[object, object]:
    """What both return, without caches where these differ in width."""
    found = reference.run_inputs(call), candidate.run_inputs(call)
    if not reference.inputs.caches or [v.shape for v in reference.inputs.cached] == [v.shape for v in candidate.inputs.cached]:
        return found
    return _without_caches(reference, found[0]), _without_caches(candidate, found[1])


def _without_caches(program: Program, found: object) -> list[object]:
    nodes = pytree.arg_tree_leaves(program.graph.output_node().args[0])
    return [v for v, node in zip(pytree.tree_leaves(found), nodes, strict=True) if program.cache_nodes.isdisjoint(node.all_input_nodes)]


def _output_pairs(reference: object, candidate: object) -> list[tuple[Tensor, Tensor]]:
    left, right = (list(filter(torch.is_tensor, pytree.tree_leaves(o))) for o in (reference, candidate))
    if [t.shape for t in left] != [t.shape for t in right]:
        raise CalibrationError(f"parity: outputs differ in shape: expected {[list(t.shape) for t in left]}, got {[list(t.shape) for t in right]}")
    return list(zip(left, right, strict=True))


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest difference, and the largest finite magnitude in `a`."""
    error = scale = 0.0
    for x, y in zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True):
        x, y = x.double(), y.to(x.device).double()
        same = (x == y) | (x.isnan() & y.isnan())
        difference = (x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)
        magnitude = x.abs().nan_to_num(nan=0.0, posinf=0.0)
        error, scale = max(error, float(difference.max())), max(scale, float(magnitude.max()))
    return error, scale
