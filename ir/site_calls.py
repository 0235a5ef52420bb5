"""Operator calls for weight sites: which sites have an fxpress operator, its call, the plain operator's call, and where a bias goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .errors import EditError
from .formats.base import WeightFormat
from .nodes import argument, get_tensor
from .sites import CONVOLUTIONS, SiteKind, WeightSite


def why_not_compressible(site: WeightSite) -> str | None:
    """Reason why the site's node has no fxpress counterpart, or None."""
    if site.compressed:
        return f"already holds {site.format.to_spec()}; start from the uncompressed program"
    if site.kind is SiteKind.ADDMM and (argument(site.node, "alpha"), argument(site.node, "beta")) != (1, 1):
        return "addmm with alpha or beta other than 1"
    if site.kind is SiteKind.ADDMM and (site.bias is None or _bias_shape(site) != (site.rows,)):
        return f"addmm that adds something other than a stored bias [{site.rows}]"
    if site.kind is SiteKind.EMBEDDING and (argument(site.node, "scale_grad_by_freq") or argument(site.node, "sparse")):
        return "embedding with training-only options"
    if isinstance(argument(site.node, "padding"), str) and _explicit_padding(site) is None:
        return f"padding {argument(site.node, 'padding')!r} that needs different amounts on both sides"
    return None


def conv_geometry(site: WeightSite) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation of a conv site, each one int per spatial axis."""
    count = len(site.shape) - 2
    padding = _explicit_padding(site)
    if padding is None:
        raise EditError(f"{site}: padding {argument(site.node, 'padding')!r} needs different amounts on both sides")
    return _per_axis(argument(site.node, "stride"), count), padding, _per_axis(argument(site.node, "dilation"), count)


def bias_place(site: WeightSite) -> int:
    """Position of the bias among the arguments of the site's node."""
    return 0 if site.kind is SiteKind.ADDMM else 2


def _bias_shape(site: WeightSite) -> tuple[int, ...] | None:
    module = site.node.graph.owning_module
    return None if site.bias is None or module is None else tuple(get_tensor(module, site.bias).shape)


def why_no_bias(site: WeightSite, bias: Tensor) -> str | None:
    """Reason why `set_bias` cannot give the site this bias, or None."""
    if site.kind in (SiteKind.MM, SiteKind.EMBEDDING):
        return f"{site.kind.value} takes no bias"
    if tuple(bias.shape) != (site.rows,):
        return f"expected a bias [{site.rows}], got {list(bias.shape)}"
    place = bias_place(site)
    if site.bias is None and len(site.node.args) > place and site.node.args[place] is not None:
        return "its bias is computed, not stored"
    return None


def _explicit_padding(site: WeightSite) -> list[int] | None:
    """Padding as ints per axis, or None when `same` would be asymmetric."""
    padding, kernel = argument(site.node, "padding"), site.shape[2:]
    dilation = _per_axis(argument(site.node, "dilation"), len(kernel))
    if padding == "valid":
        return [0] * len(kernel)
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return None if any(t % 2 for t in total) else [t // 2 for t in total]
    return _per_axis(padding, len(kernel))


def _per_axis(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


def compressed_call(site: WeightSite, fmt: WeightFormat, stored: list[fx.Node]) -> tuple[Any, tuple[Any, ...]]:
    """The fxpress operator that holds the payload nodes `stored`, and its arguments."""
    spec, shape = fmt.to_spec(), list(site.shape)
    if site.kind is SiteKind.EMBEDDING:
        return torch.ops.fxpress.embedding.default, (site.data, stored, spec, shape, site.dtype)
    if site.kind in CONVOLUTIONS:
        return torch.ops.fxpress.conv.default, (site.data, stored, argument(site.node, "bias"), spec, shape, *conv_geometry(site), site.groups)
    bias = {SiteKind.LINEAR: "bias", SiteKind.ADDMM: "self"}.get(site.kind)
    return torch.ops.fxpress.linear.default, (site.data, stored, argument(site.node, bias) if bias else None, spec, [site.rows, site.columns])


def plain_call(site: WeightSite, weight: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The plain operator on a weight node, and its arguments."""
    if site.kind is SiteKind.EMBEDDING:
        return torch.ops.aten.embedding.default, (weight, site.data)
    bias = argument(site.node, "bias")
    if site.kind is SiteKind.LINEAR:
        return torch.ops.aten.linear.default, (site.data, weight, bias)
    target = torch.ops.aten.conv1d.default if site.kind is SiteKind.CONV1D else torch.ops.aten.conv2d.default
    geometry = [argument(site.node, name) for name in ("stride", "padding", "dilation", "groups")]
    return target, (site.data, weight, bias, *geometry)


def refreshed(node: fx.Node, site: WeightSite, fmt: WeightFormat) -> WeightSite:
    """The site as it stands after `compress`."""
    shape = (site.rows, site.columns) if site.transposed else site.shape
    kind = SiteKind.LINEAR if site.transposed else site.kind
    return replace(site, node=node, kind=kind, shape=shape, format=fmt)
