"""Input statistics of weight sites, streamed through the graph so that memory stays bounded.

A `CalibrationWalk` runs all calibration batches side by side up to the next site and holds only the values that are still needed. Statistics
are made just before a site is reached, used, and dropped; a pass that edits sites on the way is seen by everything after them
(the sequential mode of GPTQ and Wanda, at the granularity of sites that share an input).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ir.errors import CalibrationError, CaptureError, FxpressError
from ..ir.inputs import Inputs, as_inputs
from ..ir.nodes import get_tensor
from ..ir.ops import decode_once
from ..ir.program import Program
from ..ir.site_calls import conv_geometry, why_not_compressible
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from .base import Need
from .context import Call

PATCH_ELEMENTS = 2**24  # im2col is done in slices of at most this many elements


def as_calls(calibration: Iterable[Any] | None, inputs: Inputs) -> tuple[Call, ...]:
    """Calibration batches as calls `(args, kwargs)`, checked against the captured inputs.

    Each batch is a tensor, tuple or dict like `example_inputs`; constants of the capture (such as `use_cache=False`) may be left out of a dict.
    They are moved to where the captured inputs lie. Raises `CalibrationError` naming the batch for a wrong structure, dtype, shape, or NaN and infinite values.
    """
    if calibration is None:
        return ()
    calls = [as_call(f"calibration batch {i}", batch, inputs, CalibrationError) for i, batch in enumerate(calibration)]
    if not calls:
        raise CalibrationError("calibration is empty; pass at least one batch shaped like example_inputs")
    return tuple(calls)


def as_call(where: str, batch: Any, inputs: Inputs, kind: type[FxpressError]) -> Call:
    """One batch as a call; what does not fit is an error of this `kind` that says `where`."""
    try:
        args, kwargs = as_inputs(batch)
        kwargs = {k: v for k, v in inputs.kwargs.items() if not isinstance(v, Tensor) and k not in inputs.caches} | kwargs
        leaves = inputs.flatten(args, kwargs)
    except (ValueError, CaptureError) as error:
        raise kind(f"{where}: {error}") from error
    if (reason := inputs.why_mismatch(leaves)) is not None:
        raise kind(f"{where}: {reason}")
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise kind(f"{where}: holds NaN or infinite values; clean the data")
    return inputs.placed((args, kwargs))


@dataclass
class Statistics:
    """Statistics of one data node over `tokens` rows (tokens, or conv patches). G is the number of conv groups, else 1.

    `mean`, `mean_abs`, `mean_square`, `abs_max`: `[G, K] f32`; `gram`: `[G, K, K] f32`, the mean of x x^T. Only what was asked for is set. By the site's name:
    `guided: [P, K, K] f32`, the mean of s x x^T for every part of the outputs, and `fisher: [N, K] f32` (see `sensitivities`). `inputs`: the node's values,
    one a batch, shared with the walk.
    """

    tokens: int = 0
    mean: Tensor | None = None
    mean_square: Tensor | None = None
    mean_abs: Tensor | None = None
    abs_max: Tensor | None = None
    gram: Tensor | None = None
    guided: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()
    exact: bool = False  # in float64: small parts of data with a large mean are lost in float32
    shared: dict[str, Any] = field(default_factory=dict)  # what a pass derived once for all sites with this input

    def add(self, rows: Tensor, needs: Need) -> None:
        """Fold in `rows: [G, T, K]`."""
        self.tokens += rows.shape[1]
        rows = rows.double() if self.exact else rows.float()
        if Need.MEAN in needs:
            self.mean = _sum(self.mean, rows.sum(1))
        if Need.MEAN_SQUARE in needs:
            self.mean_square = _sum(self.mean_square, rows.square().sum(1))
        if Need.MEAN_ABS in needs:
            self.mean_abs = _sum(self.mean_abs, rows.abs().sum(1))
        if Need.ABS_MAX in needs:
            peak = rows.abs().amax(1)
            self.abs_max = peak if self.abs_max is None else torch.maximum(self.abs_max, peak)
        if Need.GRAM in needs:
            self.gram = _sum(self.gram, rows.transpose(1, 2) @ rows)

    def finish(self) -> None:
        """Turn sums into means and refuse values that are not finite."""
        for name in ("mean", "mean_abs", "mean_square", "gram"):
            value = getattr(self, name)
            if value is not None:
                value.div_(self.tokens)
                if not bool(torch.isfinite(value).all()):
                    raise CalibrationError(f"statistics ({name}) are not finite: the model overflows on the calibration data; check the batches or use fp32")


def _other_rows(site: WeightSite, seen: int, positions: Tensor) -> CalibrationError:
    return CalibrationError(f"{site.name}: sees at least {seen} rows, but its gradients were taken over {positions.shape[1]}; the calibration data changed")


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def site_rows(site: WeightSite, x: Tensor) -> Iterable[Tensor]:
    """The rows `[G, T, K]` that the site's matrix multiplies, in slices; `x` is the site's data."""
    if site.kind not in CONVOLUTIONS:
        yield x.reshape(1, -1, x.shape[-1])
        return
    stride, padding, dilation = (tuple(v) if len(v) == 2 else (pad, *v) for v, pad in zip(conv_geometry(site), (1, 0, 1), strict=True))
    kernel = site.shape[2:] if len(site.shape) == 4 else (1, *site.shape[2:])
    x = x if len(site.shape) == 4 else x.unsqueeze(2)
    step = max(1, PATCH_ELEMENTS // max(1, x[0].numel() * kernel[0] * kernel[1]))
    for part in x.split(step):
        patches = F.unfold(part, kernel, dilation=dilation, padding=padding, stride=stride)
        yield patches.unflatten(1, (site.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def why_not_observable(site: WeightSite) -> str | None:
    """Reason why the rows a site sees cannot be formed, or None."""
    if site.kind is SiteKind.EMBEDDING:
        return "an embedding sees indices, not rows; use a pass without calibration"
    if site.kind in CONVOLUTIONS:
        return why_not_compressible(site)
    return None


def site_groups(sites: Sequence[WeightSite]) -> list[list[WeightSite]]:
    """Sites that see the same rows (query, key and value projections), in graph order of their first member."""
    groups: dict[Any, list[WeightSite]] = {}
    for site in sites:
        convolution = site.kind in CONVOLUTIONS
        key = (site.data, site.groups, site.shape[2:], str(conv_geometry(site))) if convolution else (site.data,)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


class CalibrationWalk:
    """Runs a program over all calibration batches up to one node after another, forwards only."""

    def __init__(self, program: Program, calls: Sequence[Call]) -> None:
        if not calls:
            raise CalibrationError("this recipe needs calibration data; pass calibration=[batch, ...] with batches shaped like example_inputs")
        self._module = program.graph_module
        self._next: fx.Node = next(iter(program.graph.nodes))
        self._done: set[fx.Node] = set()
        self._values: list[dict[fx.Node, Any]] = [{} for _ in calls]
        self._leaves = [program.inputs.flatten(args, kwargs) for args, kwargs in calls]
        self._input = 0

    def statistics(self, sites: Sequence[WeightSite], needs: Need) -> Statistics:
        """Statistics of the rows that `sites` (one group of `site_groups`) see, after running everything before the first."""
        return self.folds(sites, needs, 1)[0]

    def folds(self, sites: Sequence[WeightSite], needs: Need, count: int) -> list[Statistics]:
        """As `statistics`, of `count` consecutive parts of every batch's rows, so that what is fitted on one can be judged on another."""
        self.run_before(sites[0].node)
        found = [Statistics() for _ in range(count)]
        if Need.INPUTS in needs:
            found[0].inputs = tuple(values[sites[0].data] for values in self._values)
        for values in self._values if needs & ~Need.INPUTS else ():
            for rows in site_rows(sites[0], values[sites[0].data]):
                for statistics, part in zip(found, rows.tensor_split(count, dim=1), strict=True):
                    statistics.add(part, needs)
        for statistics in found:
            statistics.finish()
        return found

    def guided(self, site: WeightSite, positions: Tensor) -> Tensor:
        """Mean of `s x x^T` over the rows x of `site`, `[P, K, K] f32`; `positions: [P, T]` is the s of every row over all calls. After `statistics`."""
        total = torch.zeros(len(positions), site.columns, site.columns)
        seen, each = 0, len(positions) // site.groups
        for values in self._values:
            for rows in site_rows(site, values[site.data]):
                part = positions[:, seen : seen + rows.shape[1]].unsqueeze(-1)
                seen += rows.shape[1]
                if seen > positions.shape[1]:
                    raise _other_rows(site, seen, positions)
                for i, weight in enumerate(part):
                    one = rows[i // each].float()
                    total[i].addmm_((one * weight).t(), one)
        if seen != positions.shape[1]:
            raise _other_rows(site, seen, positions)
        return total.div_(seen)

    def run_before(self, node: fx.Node) -> None:
        """Run every node before `node`."""
        with torch.no_grad():
            while self._next is not node and self._next.op != "output":
                self._step(self._next)
                self._next = self._next.next

    def values(self, node: fx.Node) -> list[Any]:
        """What `node` gave in every call; it has run, and something after the walk's place still reads it."""
        return [values[node] for values in self._values]

    def realign(self, previous: fx.Node) -> None:
        """After an edit: when the node the walk stands before is gone, go on after `previous`, the last node left before it."""
        if self._next._erased:
            self._next = previous.next

    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            for values, leaves in zip(self._values, self._leaves, strict=True):
                values[node] = leaves[self._input]
            self._input += 1
        elif node.op == "call_function":
            with decode_once():
                for values in self._values:
                    values[node] = self._call(node, values)
        self._done.add(node)
        self._free(node)

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        def load(n: fx.Node) -> Any:
            return get_tensor(self._module, str(n.target)) if n.op == "get_attr" else values[n]

        return node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))  # type: ignore[operator]

    def _free(self, node: fx.Node) -> None:
        """Drop the values whose users have all run."""
        for source in [*node.all_input_nodes, node]:
            if all(user in self._done for user in source.users):
                for values in self._values:
                    values.pop(source, None)
