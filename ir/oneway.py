"""One-way convolutions: kernels as sums of products of one filter along the channels and one along each axis, run filter by filter or multiplied together.

A kernel `K: [F, C, *k]` is `K_f = sum_r a_fr (x) v_fr (x) h_fr`, R terms for each output map. Factored, that is a 1x1 convolution to F R channels
(`channels`), a depthwise one along every axis but the last (`axis0`, ...), and one along the last axis whose F groups sum the R terms. Composed, the kernel
is multiplied out in the graph and one convolution runs. Both read the same stored weights, so one can become the other at any time.

Filters of this kind: flattened networks (Jin et al., arXiv 1412.5474); before training, for wave simulators: Boukraichi et al. (arXiv 2304.04964), of which
only the abstract was read. The sum of R terms in the last grouped convolution, and the two forms over one set of weights, are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .chain import CONVS, Chain, Convolution
from .edit import Editor, record
from .nodes import argument, get_tensor
from .program import Program
from .shapes import ensure_values, take_place
from .site_calls import conv_geometry
from .sites import CONVOLUTIONS, WeightSite

aten = torch.ops.aten
CHANNELS = "channels"
_PART = re.compile(rf"^(?P<name>.+)\.(?:{CHANNELS}|axis(?P<axis>\d+))$")
Geometry = tuple[list[int], list[int], list[int]]


def kernel_axes(shape: Sequence[int]) -> list[int]:
    """Axes of the weight along which the kernel has more than one position."""
    return [axis for axis in range(2, len(shape)) if shape[axis] > 1]


def filter_shapes(shape: Sequence[int], terms: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the filters of a kernel `[F, C, *k]` (C: channels of one group), by name, in order; without `channels` where C is 1."""
    axes, maps = kernel_axes(shape), shape[0] * terms
    sizes = {axis: tuple(shape[a] if a == axis else 1 for a in range(2, len(shape))) for axis in axes}
    found: dict[str, tuple[int, ...]] = {} if shape[1] == 1 else {CHANNELS: (maps, shape[1], *(1,) * (len(shape) - 2))}
    found |= {f"axis{i}": (maps, 1, *sizes[axis]) for i, axis in enumerate(axes[:-1])}
    return found | {f"axis{len(axes) - 1}": (shape[0], terms, *sizes[axes[-1]])}


def chain_of(filters: dict[str, Tensor], geometry: Geometry, groups: int) -> Chain:
    """The factored form: every filter takes stride, padding and dilation of its own axis, the first along an axis those of flat axes too."""
    rank = next(iter(filters.values())).dim() - 2
    along = [n for n in filters if n != CHANNELS]
    links: list[Convolution] = []
    for name, weight in filters.items():
        mine = [i for i in range(rank) if weight.shape[2 + i] > 1 or (name == along[0] and _flat(filters, i))]
        moved = [tuple(v[i] if i in mine else neutral for i in range(rank)) for v, neutral in zip(geometry, (1, 0, 1), strict=True)]
        split = weight.shape[0] if links else groups  # the first filter sees the groups as they are, the others a map (or its terms) each
        links.append(Convolution(name=name, weight=weight, stride=moved[0], padding=moved[1], dilation=moved[2], groups=split))
    return tuple(links)


def _flat(filters: dict[str, Tensor], axis: int) -> bool:
    return all(f.shape[2 + axis] == 1 for f in filters.values())


def kernel(filters: dict[str, Tensor]) -> Tensor:
    """The kernel `[F, C, *k]` that the filters stand for."""
    graph = fx.Graph()
    placeholders = {name: graph.placeholder(name) for name in filters}
    graph.output(_multiply(graph, placeholders, {n: tuple(f.shape) for n, f in filters.items()}))
    made: Tensor = fx.GraphModule({}, graph)(*filters.values())
    return made


def _multiply(graph: fx.Graph, filters: dict[str, fx.Node], shapes: dict[str, tuple[int, ...]]) -> fx.Node:
    """Nodes that make `[F, C, *k]` of the filters."""
    *others, last = [n for n in filters if n != CHANNELS]
    maps, terms = shapes[last][:2]
    product = filters[last]
    for name in others:
        rows = graph.call_function(aten.view.default, (filters[name], [maps, terms, *shapes[name][2:]]))
        product = graph.call_function(aten.mul.Tensor, (rows, product))
    if CHANNELS not in filters:
        return graph.call_function(aten.sum.dim_IntList, (product, [1], True))
    kernel = [max(shapes[n][2 + i] for n in filters) for i in range(len(shapes[last]) - 2)]
    columns = shapes[CHANNELS][1]
    flat = graph.call_function(aten.view.default, (product, [maps, terms, -1]))
    mixes = graph.call_function(aten.view.default, (filters[CHANNELS], [maps, terms, columns]))
    turned = graph.call_function(aten.transpose.int, (mixes, 1, 2))
    return graph.call_function(aten.view.default, (graph.call_function(aten.bmm.default, (turned, flat)), [maps, columns, *kernel]))


@dataclass(frozen=True)
class OneWay:
    """A one-way convolution in a graph: its `nodes` (factored: one a filter; composed: one), and the stored filters by name."""

    name: str
    nodes: tuple[fx.Node, ...]
    filters: dict[str, str]
    composed: bool


def find_oneways(program: Program) -> list[OneWay]:
    """All one-way convolutions, in graph order."""
    sites = {s.node: s for s in program.sites()}
    found = []
    for node in program.graph.nodes:
        site = sites.get(node)
        if site is not None and site.kind in CONVOLUTIONS and not site.compressed:
            found += _factored(site, sites)
        elif node.op == "call_function" and node.target in CONVS.values() and isinstance(node.args[1], fx.Node) and node.args[1].op == "call_function":
            found += _composed(node)
    return found


def _factored(last: WeightSite, sites: dict[fx.Node, WeightSite]) -> list[OneWay]:
    """The chain that ends at the site, if it is the last of one."""
    part = _PART.match(last.name)
    after = [s for s in (sites.get(u) for u in last.node.users) if s is not None]
    if part is None or part["axis"] is None or any((m := _PART.match(s.name)) and m["name"] == part["name"] for s in after):
        return []
    chain = [last]
    while (site := sites.get(chain[0].data)) and (m := _PART.match(site.name)) and m["name"] == part["name"] and not site.compressed:
        if len(site.node.users) > 1:
            return []
        chain.insert(0, site)
    filters = {s.name.rpartition(".")[2]: s.tensors[0] for s in chain}
    return [OneWay(part["name"], tuple(s.node for s in chain), filters, composed=False)] if len(chain) > 1 else []


def _composed(node: fx.Node) -> list[OneWay]:
    """The convolution, if its weight is multiplied from filters."""
    reads, seen = [], [node.args[1]]
    for one in seen:
        assert isinstance(one, fx.Node)
        reads += [one] if one.op == "get_attr" else []
        seen += [i for i in one.all_input_nodes if i not in seen]
    matches = {str(n.target): _PART.match(str(n.target).removesuffix(".weight")) for n in reads}
    names = {m["name"] for m in matches.values() if m is not None}
    if len(names) != 1 or None in matches.values():
        return []
    filters = {target.removesuffix(".weight").rpartition(".")[2]: target for target in sorted(matches, key=_place)}
    return [OneWay(names.pop(), (node,), filters, composed=True)]


def _place(target: str) -> int:
    part = _PART.match(target.removesuffix(".weight"))
    return -1 if part is None or part["axis"] is None else int(part["axis"])


def compose(editor: Editor, one: OneWay, why: str) -> None:
    """The factored convolution becomes one convolution with the kernel multiplied out before it."""
    program, (first, *_), last = editor.program, one.nodes, one.nodes[-1]
    ensure_values(program)
    sites = {s.node: s for s in program.sites()}
    shapes = {n: tuple(get_tensor(program.graph_module, t).shape) for n, t in one.filters.items()}
    geometry = [conv_geometry(sites[n]) for n in one.nodes]
    stride, padding, dilation = ([v for *_, v in map(sorted, zip(*(g[i] for g in geometry), strict=True))] for i in range(3))  # all others are neutral
    with program.graph.inserting_before(last):
        before = set(program.graph.nodes)
        reads = {n: program.graph.get_attr(t) for n, t in one.filters.items()}
        weight = _multiply(program.graph, reads, shapes)
        args = (sites[first].data, weight, argument(last, "bias"), stride, padding, dilation, sites[first].groups)
        node = program.graph.call_function(CONVS[len(shapes["axis0"])], args)
    for new, read in zip(reads.values(), [n.args[1] for n in one.nodes], strict=True):
        new.meta["val"] = read.meta["val"]  # type: ignore[union-attr]
    for new in [n for n in program.graph.nodes if n not in before and n.op == "call_function"]:
        take_place(new, last)
    editor.exchange(last, node, why)


def factor(editor: Editor, one: OneWay, why: str) -> None:
    """The composed convolution becomes its filters, one after another."""
    program, (old,) = editor.program, one.nodes
    ensure_values(program)
    filters = {n: get_tensor(program.graph_module, t) for n, t in one.filters.items()}
    geometry = [list(argument(old, key)) for key in ("stride", "padding", "dilation")]
    x: Any = old.args[0]
    links = chain_of(filters, (geometry[0], geometry[1], geometry[2]), argument(old, "groups"))
    reads = {str(n.target): n for n in program.graph.nodes if n.op == "get_attr"}
    for link in links:
        assert isinstance(link, Convolution)
        with program.graph.inserting_before(old):
            weight = program.graph.get_attr(one.filters[link.name])
            weight.meta["val"] = reads[one.filters[link.name]].meta["val"]
            x = program.graph.call_function(*link.call(x, weight, argument(old, "bias") if link is links[-1] else None))
        take_place(x, old).meta["fxpress_site"] = f"{one.name}.{link.name}"
        if link is not links[-1]:
            editor.added(record(x), why)
    editor.exchange(old, x, why)
