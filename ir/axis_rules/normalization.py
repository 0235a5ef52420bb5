"""Norms: layer, root-mean-square, group, instance and batch."""

from __future__ import annotations

from math import prod

from torch import fx

from ..atoms import Axis, MisalignedError
from ..axes import Result, Tracer
from ..nodes import argument
from .registry import place, rule

AFFINE = ("weight", "bias", "running_mean", "running_var")


def _affine(t: Tracer, node: fx.Node, axes: tuple[Axis, ...]) -> None:
    """Unify the trailing axes of the stored vectors with `axes`."""
    for name in AFFINE:
        stored = argument(node, name)
        for mine, other in zip(t.of(stored), axes, strict=False):
            t.unify(mine, other, node.name)


def _results(t: Tracer, node: fx.Node, first: tuple[Axis, ...]) -> Result:
    """The first result has the given axes; the others (statistics) are pinned."""
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return first
    rest = t.pinned(node, f"statistics of {node.name}")[1:]
    return [first, *rest]


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def last_axes(t: Tracer, node: fx.Node) -> Result:
    """Normalises over the trailing axes, whose sizes it names."""
    axes = t.of(node.args[0])
    count = len(argument(node, "normalized_shape"))
    where = place(node, "normalized_shape")
    for i, axis in enumerate(axes[-count:]):
        t.reduce(axis, node.name)
        t.constant(node, (*where, i), axis)
    _affine(t, node, axes[-count:])
    return _results(t, node, axes)


@rule("aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update")
def batch(t: Tracer, node: fx.Node) -> Result:
    """One statistic a channel (axis 1): no channel sees another."""
    axes = t.of(node.args[0])
    if argument(node, "training"):
        raise MisalignedError  # it would average over the batch
    _affine(t, node, axes[1:2])
    return _results(t, node, axes)


@rule("aten.instance_norm")
def instance(t: Tracer, node: fx.Node) -> Result:
    """As batch norm; the spatial axes are averaged over."""
    axes = t.of(node.args[0])
    for axis in axes[2:]:
        t.pin(axis, f"{node.name} averages over it")
    _affine(t, node, axes[1:2])
    return axes


@rule("aten.group_norm", "aten.native_group_norm")
def grouped(t: Tracer, node: fx.Node) -> Result:
    """The channel axis is `groups x channels a group`; the norm goes over the second. Its native form also names the channel and pixel counts."""
    axes = t.of(node.args[0])
    name = "num_groups" if argument(node, "num_groups") is not None else "group"
    groups, inner = t.grouped(axes[1], int(argument(node, name)))
    t.constant(node, place(node, name), groups)
    t.reduce(inner, node.name)
    for axis in axes[2:]:
        t.pin(axis, f"{node.name} averages over it")
    if name == "group":
        if prod(map(int, node.meta["val"][0].shape[2:])) != argument(node, "HxW"):
            raise MisalignedError
        t.constant(node, place(node, "C"), axes[1])
    _affine(t, node, axes[1:2])
    return _results(t, node, axes)
