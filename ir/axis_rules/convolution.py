"""Convolutions, pools, padding, resampling: channels are axes, pixels are pinned."""

from __future__ import annotations

from torch import fx

from ..atoms import Axis, size_of
from ..axes import Result, Tracer
from ..nodes import argument, op_name
from .registry import ints, place, rule


def _spatial(t: Tracer, node: fx.Node, x: tuple[Axis, ...], count: int) -> tuple[Axis, ...]:
    """New pinned axes for the last `count` of the result; the input's are pinned too."""
    why = f"pixels of {node.name}"
    for axis in x[len(x) - count :]:
        t.pin(axis, why)
    value = node.meta["val"]
    result = t.pinned(node, why)
    return tuple((result[0] if isinstance(value, (tuple, list)) else result)[-count:])


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def convolution(t: Tracer, node: fx.Node) -> Result:
    """`weight [O, I/groups, ...]`, transposed `[I, O/groups, ...]`. With groups both channel axes are `groups x inner`: depthwise falls out."""
    x, weight, bias = (t.of(argument(node, a)) for a in ("input", "weight", "bias"))
    groups = int(argument(node, "groups"))
    transposed = "conv_transpose" in node.target._schema.name or bool(argument(node, "transposed"))  # type: ignore[union-attr]
    for kernel in weight[2:]:
        t.pin(kernel, f"kernel of {node.name}")
    spatial = _spatial(t, node, x, len(weight) - 2)
    channels = x[-(len(weight) - 1)]
    out = _grouped(t, node, channels, weight, groups, transposed)
    for axis in bias:
        t.unify(out, axis, node.name)
    if groups > 1:
        t.constant(node, place(node, "groups"), t.grouped(channels, groups)[0])
    work = (*x[: -(len(weight) - 1)], *weight, *(x[-(len(weight) - 2) :] if transposed else spatial))
    t.contract(node, work, channels, (argument(node, "input"), argument(node, "weight")))
    return (*x[: -(len(weight) - 1)], out, *spatial)


def _grouped(t: Tracer, node: fx.Node, channels: Axis, weight: tuple[Axis, ...], groups: int, transposed: bool) -> Axis:
    """Unify the weight's channel axes with the input's; returns the output channels."""
    if groups == 1:
        t.unify(channels, weight[0] if transposed else weight[1], node.name)
        return weight[1] if transposed else weight[0]
    group, inner = t.grouped(channels, groups)
    if transposed:
        t.unify(channels, weight[0], node.name)
        return group + weight[1]
    t.unify(inner, weight[1], node.name)
    own, _ = t.grouped(weight[0], groups)
    t.unify(group, own, node.name)
    return weight[0]


@rule("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d", "aten.max_pool2d_with_indices", "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d",
      "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d", "aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d",
      "aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d", "aten.upsample_linear1d")  # fmt: skip
def pool(t: Tracer, node: fx.Node) -> Result:
    """Every channel for itself."""
    x = t.of(node.args[0])
    count = int(next(c for c in node.target._schema.name if c.isdigit()))  # type: ignore[union-attr]
    out = (*x[: len(x) - count], *_spatial(t, node, x, count))
    return [out, out] if isinstance(node.meta["val"], (tuple, list)) else out


@rule("aten.pad", "aten.constant_pad_nd", "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.replication_pad1d", "aten.replication_pad2d")
def pad(t: Tracer, node: fx.Node) -> Result:
    """An axis padded with a constant becomes a concatenation whose new parts are classes of their own; one padded otherwise is pinned."""
    axes = list(t.of(node.args[0]))
    name = "pad" if argument(node, "pad") is not None else "padding"
    amounts = ints(argument(node, name))
    constant = argument(node, "mode") in (None, "constant") and "_pad" not in op_name(node).replace("constant_pad", "")
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i : 2 * i + 2]
        d = len(axes) - 1 - i
        if before == after == 0:
            continue
        if min(before, after) < 0 or not constant:
            t.pin(axes[d], f"{node.name} repeats or cuts it")
            axes[d] = t.pinned(node, f"padded by {node.name}")[d]
            continue
        parts = [t.axis(n) for n in (before, size_of(axes[d]), after) if n]
        own = 1 if before else 0
        for j, part in enumerate(parts):
            if j == own:
                t.unify(part, axes[d], node.name)
        if before:
            t.constant(node, (*place(node, name), 2 * i), parts[0])
        if after:
            t.constant(node, (*place(node, name), 2 * i + 1), parts[-1])
        axes[d] = t.concat(parts)
    return tuple(axes)


@rule("aten.pixel_shuffle")
def pixel_shuffle(t: Tracer, node: fx.Node) -> Result:
    """`[.., C*r*r, H, W]` becomes `[.., C, H*r, W*r]`."""
    x, r = t.of(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    channels, inner = t.grouped(x[-3], size_of(x[-3]) // (r * r))
    t.pin(inner, f"pixels of {node.name}")
    return (*x[:-3], channels, *_spatial(t, node, x, 2))
