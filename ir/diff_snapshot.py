"""A program frozen into plain facts, so that two programs can be compared node by node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .edit import record
from .journal import NodeRecord
from .nodes import get_tensor, tensor_type
from .program import Program
from .sites import WeightSite, find_sites
from .weights import named_tensors, storage_key

_SYMBOL = re.compile(r"\b[su]\d+\b")


@dataclass(frozen=True, kw_only=True)
class NodeView(NodeRecord):
    """A `NodeRecord` with what a comparison needs beyond it.

    `parameters` and `nbytes` are those of the site's weight. `stored_parameters` and `stored_bytes` are all tensors the node is the first to read, biases,
    norms and constants included, so that they add up to the program's totals; `shared` marks a node that reads tensors counted at an earlier one.
    """

    weight: str = ""  # type of a site's weight as its operator takes it
    constants: str = ""  # the arguments that are no nodes
    tied: tuple[str, ...] = ()
    stored_parameters: int = 0
    stored_bytes: int = 0
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Size of a whole program; `unread` bytes belong to tensors that no node reads."""

    nodes: int
    parameters: int
    nbytes: int
    unread: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Every node but the weight reads in graph order, the tensors each one reads, and the names of the weight reads."""

    nodes: dict[str, NodeView]
    tensors: dict[str, tuple[Tensor, ...]] = field(repr=False)
    reads: frozenset[str]
    symbols: Symbols
    totals: Totals


class Symbols:
    """Renames torch's size symbols in order of appearance, so that two captures of one model print equally."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """`text` with its symbols renamed."""
        return _SYMBOL.sub(lambda m: self._names.setdefault(m.group(), f"s{len(self._names)}"), text)


class _Ledger:
    """Counts every storage once, at its first reader."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def claim(self, tensor: Tensor) -> int | None:
        """Bytes of the tensor's storage, or None when it is counted already."""
        key = storage_key(tensor)
        if key in self._seen:
            return None
        self._seen.add(key)
        return tensor.untyped_storage().nbytes()


def snapshot(program: Program) -> Snapshot:
    """The program as it stands."""
    sites = {s.node: s for s in find_sites(program)}
    ledger, symbols = _Ledger(), Symbols()
    tensors = {n.name: tuple(_tensors(n)) for n in program.graph.nodes if n.op != "get_attr"}
    nodes = {n.name: _view(n, sites.get(n), ledger, symbols) for n in program.graph.nodes if n.op != "get_attr"}
    reads = frozenset(n.name for n in program.graph.nodes if n.op == "get_attr")
    return Snapshot(nodes, tensors, reads, symbols, _totals(program, nodes, ledger))


def _totals(program: Program, nodes: dict[str, NodeView], ledger: _Ledger) -> Totals:
    unread = [(t, size) for _, t in named_tensors(program.graph_module) if (size := ledger.claim(t)) is not None]
    unread_bytes = sum(size for _, size in unread)
    return Totals(
        nodes=len(nodes),
        parameters=sum(v.stored_parameters for v in nodes.values()) + sum(_elements(t) for t, _ in unread),
        nbytes=sum(v.stored_bytes for v in nodes.values()) + unread_bytes,
        unread=unread_bytes,
    )


def _view(node: fx.Node, site: WeightSite | None, ledger: _Ledger, symbols: Symbols) -> NodeView:
    facts = vars(record(node, site))
    parameters, nbytes, shared = _claim(node, site, ledger)
    return NodeView(
        **facts | {"type": symbols(facts["type"])},
        weight=_weight_type(site) if site else "",
        constants=symbols(_constants(node)),
        tied=site.tied if site else (),
        stored_parameters=parameters,
        stored_bytes=nbytes,
        shared=shared,
    )


def _weight_type(site: WeightSite) -> str:
    return str(tensor_type(torch.empty(site.shape, dtype=site.dtype, device="meta")))


def _claim(node: fx.Node, site: WeightSite | None, ledger: _Ledger) -> tuple[int, int, bool]:
    """Parameters and bytes the node is the first to read, and whether it also reads some that are counted already."""
    parameters = nbytes = 0
    shared = False
    payload = site.tensors if site is not None and site.compressed else ()
    for name, tensor in zip(_read_names(node), _tensors(node), strict=True):
        if (size := ledger.claim(tensor)) is None:
            shared = True
            continue
        nbytes += size
        parameters += 0 if name in payload else _elements(tensor)
    return parameters + (site.parameters if site is not None and payload and not shared else 0), nbytes, shared


def _elements(tensor: Tensor) -> int:
    return tensor.numel() if tensor.is_floating_point() else 0


def _read_names(node: fx.Node) -> list[str]:
    return [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    module = node.graph.owning_module
    assert module is not None
    return (get_tensor(module, name) for name in _read_names(node))


def _constants(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    return ", ".join([*map(_constant, node.args), *(f"{k}={_constant(v)}" for k, v in node.kwargs.items())])


def _constant(value: Any) -> str:
    """One argument, with nodes and weights as `%` and `@`: their identity is no constant."""
    if isinstance(value, fx.Node):
        return "@" if value.op == "get_attr" else "%"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_constant, value)) + "]"
    if isinstance(value, slice):
        return ":".join(_constant(v) for v in (value.start, value.stop, value.step))
    return repr(value) if isinstance(value, str) else str(value)


def same_weights(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    """Whether two nodes read equal tensors, bit by bit."""
    return len(before) == len(after) and all(map(_same_bits, before, after))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if storage_key(a) == storage_key(b) and (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset()):
        return True
    bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)
