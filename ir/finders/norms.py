"""Norms: those that follow a convolution and can be folded into it, and those whose result weight sites read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..axes import AxisClass
from ..nodes import argument
from ..sites import SiteKind, WeightSite
from .flow import SAME, Flow, short_name, stored_name

BATCH = {"aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update", "aten.native_batch_norm", "aten.cudnn_batch_norm"}
_WHOLE = {"aten.layer_norm": "layer_norm", "aten.native_layer_norm": "layer_norm", "aten.rms_norm": "rms_norm", "aten._fused_rms_norm": "rms_norm"}


@dataclass(frozen=True)
class ConvNorm:
    """A site whose only reader is a batch norm with fixed statistics. `norm` is that node, `result` its normalised value; the names are of stored tensors."""

    site: WeightSite
    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float
    norm: fx.Node = field(repr=False)
    result: fx.Node = field(repr=False)


@dataclass(frozen=True)
class NormLinear:
    """A layer or root-mean-square norm and the sites that read it.

    The norm multiplies by `offset + weight` (offset 1 in some models). `exclusive`: nothing but `readers` sees the result. `source` is what is normalised,
    `result` what is read.
    """

    kind: str
    weight: str | None
    bias: str | None
    offset: float
    readers: tuple[WeightSite, ...]
    exclusive: bool
    classes: tuple[AxisClass, ...]
    source: fx.Node = field(repr=False)
    result: fx.Node = field(repr=False)


def find_conv_norms(flow: Flow) -> tuple[ConvNorm, ...]:
    """Sites with a batch norm behind them, in graph order."""
    found = (_conv_norm(site) for site in flow.sites.values() if site.kind is not SiteKind.EMBEDDING)
    return tuple(one for one in found if one is not None)


def _conv_norm(site: WeightSite) -> ConvNorm | None:
    users = list(site.node.users)
    if len(users) != 1 or short_name(users[0]) not in BATCH or users[0].args[0] is not site.node or argument(users[0], "training"):
        return None
    norm = users[0]
    weight, bias, mean, variance = (stored_name(argument(norm, a)) for a in ("weight", "bias", "running_mean", "running_var"))
    result = first_result(norm)
    if mean is None or variance is None or result is None:
        return None
    eps = next(float(argument(norm, a)) for a in ("eps", "epsilon") if argument(norm, a) is not None)
    return ConvNorm(site, weight, bias, mean, variance, eps, norm, result)


def first_result(node: fx.Node) -> fx.Node | None:
    """The node itself, or what takes the first of its several results."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return node
    return next((u for u in node.users if short_name(u) == "getitem" and u.args[1] == 0), None)


def find_norm_linears(flow: Flow) -> tuple[NormLinear, ...]:
    """Norms over the last axes that weight sites read, in graph order."""
    norms = (_whole(flow, n) if short_name(n) in _WHOLE else _spelled(flow, n) for n in flow.nodes if n in flow.live)
    return tuple(one for one in norms if one is not None and one.readers)


def _whole(flow: Flow, node: fx.Node) -> NormLinear | None:
    result = first_result(node)
    if result is None:
        return None
    weight, bias = (stored_name(argument(node, a)) for a in ("weight", "bias"))
    return _norm(flow, _WHOLE[short_name(node)], weight, bias, 0.0, node.all_input_nodes[0], result)


def _spelled(flow: Flow, node: fx.Node) -> NormLinear | None:
    """`x * rsqrt(mean(x^2) + eps)`, then casts, then `* weight` (or `* (1 + weight)`)."""
    inputs = flow.live_inputs(node)
    scale = next((n for n in inputs if _is_inverse_root(n)), None)
    if short_name(node) != "aten.mul" or len(inputs) != 2 or scale is None:
        return None
    source = next((n for n in inputs if n is not scale), scale)
    passed = flow.walk_back(scale, lambda n: flow.is_end(n) or n is source)[0]
    if not any(short_name(n) == "aten.mean" for n in passed) or source is scale:
        return None
    result, weight, offset = _weighted(node)
    return _norm(flow, "rms_norm", weight, None, offset, source, result)


def _is_inverse_root(node: fx.Node) -> bool:
    return short_name(node) == "aten.rsqrt" or (short_name(node) == "aten.pow" and argument(node, "exponent") in (-0.5,))


def _weighted(node: fx.Node) -> tuple[fx.Node, str | None, float]:
    """The product with the weight that follows, if one does: `(node, weight, offset)`."""
    ahead = node
    while len(ahead.users) == 1:
        ahead = next(iter(ahead.users))
        if short_name(ahead) == "aten.mul":
            found = [w for n in ahead.all_input_nodes if (w := _stored_weight(n)) is not None]
            return (ahead, *found[0]) if found else (node, None, 0.0)
        if short_name(ahead) not in SAME:
            break
    return node, None, 0.0


def _stored_weight(node: Any) -> tuple[str, float] | None:
    """`(name, offset)` of a stored vector, directly, cast, or with a number added."""
    offset = 0.0
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if short_name(node) == "aten.add" and isinstance(node.args[1], (int, float)):
            offset += node.args[1]
        elif short_name(node) not in SAME:
            return None
        node = node.args[0]
    name = stored_name(node)
    return None if name is None else (name, offset)


def _norm(flow: Flow, kind: str, weight: str | None, bias: str | None, offset: float, source: fx.Node, result: fx.Node) -> NormLinear:
    ends = flow.walk_on(result, lambda n: short_name(n) not in SAME)[1]
    readers = tuple(flow.sites[n] for n in ends if n in flow.sites)
    classes = flow.classes(flow.leaves(result) & flow.in_leaves(*readers))
    return NormLinear(kind, weight, bias, offset, readers, len(readers) == len(ends), classes, source, result)
