"""Which tensors of a program training may change, and how they go back into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..ir.edit import Editor
from ..ir.errors import TrainingError
from ..ir.nodes import argument, get_tensor
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.weights import AliasClasses, alias_classes
from .base import SiteResult, Skip, matches

aten = torch.ops.aten
NORMS = {
    aten.layer_norm.default, aten.native_layer_norm.default, aten.group_norm.default, aten.native_group_norm.default, aten.rms_norm.default,
    aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.instance_norm.default,
}  # fmt: skip
SPARSE = 0.05  # from this fraction of zeros on, they count as removed by pruning


@dataclass(frozen=True)
class Part:
    """Tensors trained and reported under one name: a site's weight and bias, a norm's, or a parameter on its own."""

    name: str
    node: fx.Node
    site: WeightSite | None
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Healing:
    """What healing found: better weights by name, what to say about each part, and sentences for the report."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Mapping[str, float]]
    why: Mapping[str, str]
    notes: tuple[str, ...]


def find_parts(program: Program) -> tuple[tuple[Part, ...], tuple[Skip, ...]]:
    """Everything that can be trained, in graph order, and the sites that cannot.

    Trained are the float weights and biases of plain sites and of norms, and the model's other parameters (an RMS norm's weight, class tokens). Not
    trained are buffers: running statistics of batch norms, tables such as rotary frequencies.
    """
    sites = {s.node: s for s in program.sites()}
    aliases = alias_classes(program.graph_module)
    parts, skips, alone = [], [], set[str]()
    for node in program.graph.nodes:
        site = sites.get(node)
        if site is not None and site.compressed:
            skips.append(Skip(site.name, f"holds {site.format.to_spec()}: packed weights are not trained; training runs through the site"))
            continue
        names = _stored(program, node, site)
        reasons = [reason for n in names if (reason := _why_not(program, n, aliases))]
        names = tuple(n for n in names if _why_not(program, n, aliases) is None)
        if site is not None and not names:
            skips.append(Skip(site.name, reasons[0]))
        elif names and (site is not None or not alone.issuperset(names)):
            parts.append(Part(site.name if site else _title(node, names), node, site, names))
            alone.update(names)
    return tuple(parts), tuple(skips)


def _stored(program: Program, node: fx.Node, site: WeightSite | None) -> tuple[str, ...]:
    """Names of the weights the node reads."""
    if site is not None:
        return (site.tensors[0], *((site.bias,) if site.bias else ()))
    if node.op != "call_function":
        return ()
    if node.target in NORMS:
        found = [argument(node, name) for name in ("weight", "bias")]
        return tuple(str(n.target) for n in found if isinstance(n, fx.Node) and n.op == "get_attr")
    reads = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    return tuple(n for n in reads if isinstance(get_tensor(program.graph_module, n), nn.Parameter))


def _title(node: fx.Node, names: tuple[str, ...]) -> str:
    """The module that owns a norm's tensors, or the name of a parameter on its own."""
    return names[0].rpartition(".")[0] or names[0] if node.target in NORMS else names[0].removesuffix(".weight")


def _why_not(program: Program, name: str, aliases: AliasClasses) -> str | None:
    tensor = get_tensor(program.graph_module, name)
    if not tensor.is_floating_point():
        return f"{name} is {tensor.dtype}; only float tensors are trained"
    others = [a for a in aliases.of(name) if get_tensor(program.graph_module, a).shape != tensor.shape]
    return f"{name} shares storage with {others[0]} of another shape" if others else None


def part_bytes(program: Program, part: Part) -> int:
    """Bytes of the tensors of a part."""
    return sum(get_tensor(program.graph_module, n).nbytes for n in part.tensors)


def readers(program: Program, part: Part) -> list[fx.Node]:
    """Every node that reads a tensor of the part, under any of its names."""
    aliases = alias_classes(program.graph_module)
    names = {a for t in part.tensors for a in aliases.of(t)}
    return [u for n in program.graph.nodes if n.op == "get_attr" and str(n.target) in names for u in n.users]


def select(parts: Sequence[Part], patterns: Sequence[str]) -> tuple[Part, ...]:
    """The parts, and of them the tensors, whose name matches a pattern; all of them without patterns. A pattern that matches nothing is refused."""
    for pattern in patterns:
        if not any(matches(name, pattern) for p in parts for name in (p.name, *p.tensors)):
            names = ", ".join(p.name for p in parts[:5])
            raise TrainingError(f"trainable: pattern {pattern!r} matches no trainable site or tensor; there are {names}{', ...' if len(parts) > 5 else ''}")
    chosen = [Part(p.name, p.node, p.site, tuple(t for t in p.tensors if _wanted(p, t, patterns))) for p in parts]
    return tuple(p for p in chosen if p.tensors)


def _wanted(part: Part, tensor: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(matches(part.name, p) or matches(tensor, p) for p in patterns)


def zero_mask(tensor: Tensor) -> Tensor | None:
    """`True` where a weight may be other than zero, for a tensor with at least 5 % exact zeros; None for any other."""
    kept = tensor != 0
    return kept if float(kept.float().mean()) <= 1 - SPARSE else None


def write_back(
    program: Program,
    parts: Sequence[Part],
    tensors: Mapping[str, Tensor],
    pass_spec: str,
    why: str | Mapping[str, str],
    facts: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[SiteResult, ...]:
    """Bind trained tensors under all their names, with a journal entry and a result per part; empty `tensors` change nothing.

    `why` and `facts` (added to the relative change) may differ by the name of the part.
    """
    results = []
    module = program.graph_module
    old = {n: get_tensor(module, n).detach() for p in parts for n in p.tensors}
    aliases = alias_classes(module)
    of = {alias: new for name, new in tensors.items() for alias in aliases.of(name)}
    with Editor(program, pass_spec) as editor:
        for part in parts:
            new = {n: of[n] for n in part.tensors if n in of}
            known = {"relative_change": _change(new, old)} | dict((facts or {}).get(part.name, {}))
            if new:
                editor.reweight(part.node, new, why if isinstance(why, str) else why[part.name], known, part.site)
            size = part_bytes(program, part)
            results.append(SiteResult(site=part.name, action="train" if new else "keep", bytes_before=size, bytes_after=size, facts=known))
    return tuple(results)


def _change(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> float:
    """`||new - old|| / ||old||` over all tensors of a part."""
    moved = sum(float((new[n].float() - old[n].float()).square().sum()) for n in new)
    size = sum(float(old[n].float().square().sum()) for n in new)
    return (moved / max(size, 1e-30)) ** 0.5
