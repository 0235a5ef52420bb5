"""The only code that changes a program. Every edit goes through an `Editor`, which records it in the journal."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import NodeSource, NodeSourceAction
from typing_extensions import Self

from .axes import AxisAnalysis, AxisClass
from .chain import Chain, Convolution, Product, calls, parameters, with_dtype
from .errors import EditError
from .formats.base import WeightFormat
from .formats.dense import Dense
from .journal import Action, Change, NodeRecord
from .nodes import argument, get_tensor, module_path, node_type, op_name
from .program import Program, Stage
from .resize import changed_nodes, changed_tensors, checked_choice, readers, resize
from .shapes import fake_mode_of, take_place
from .site_calls import bias_place, compressed_call, plain_call, refreshed, why_no_bias, why_not_compressible
from .sites import SiteKind, WeightSite, find_sites
from .weights import alias_classes, delete_tensor, named_tensors, set_tensor

_Namer = Callable[[WeightSite, str], str]


class Editor:
    """Edits one program on behalf of one pass. Use as a context manager: leaving it prunes dead nodes and tensors and recompiles."""

    def __init__(self, program: Program, pass_spec: str) -> None:
        self.program = program
        self.pass_spec = pass_spec
        self._module = program.graph_module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()

    def set_matrix(self, site: WeightSite, matrix: Tensor, why: str, facts: Mapping[str, float] | None = None) -> None:
        """Give a plain site new weight values `[N, K]`; every tied site sees them."""
        if site.compressed or tuple(matrix.shape) != (site.rows, site.columns):
            raise EditError(
                f"set_matrix at {site}: expected a plain site and [{site.rows}, {site.columns}], got {site.format.to_spec()} and {list(matrix.shape)}"
            )
        before = record(site.node, site)
        self.set_tensor(site.tensors[0], site.from_matrix(matrix.to(site.dtype)))
        self._journal(Action.REWEIGHTED, why, before, record(site.node, site), facts)

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Rebind a parameter or buffer under all its tied names. Not journalled: callers record what it means."""
        old = get_tensor(self._module, name)
        for alias in alias_classes(self._module).of(name):
            if get_tensor(self._module, alias).shape != old.shape:
                raise EditError(f"{name} {list(old.shape)} is a view into storage that {alias} also uses; clone one of them before capture")
            set_tensor(self._module, alias, tensor, parameter=isinstance(old, torch.nn.Parameter))

    def resize_axis(self, analysis: AxisAnalysis, kept: Mapping[AxisClass, Tensor], why: str, *, views: bool = False) -> None:
        """Keep only the given indices (`[kept] int64`, in their new order) of each class, everywhere it occurs; see `resize`.

        `analysis` must be of this program as it stands, and is spent afterwards. Every node that reads a changed tensor is journalled as retyped.
        `views`: prefixes share memory with the tensors they were cut from.
        """
        choice = checked_choice(analysis, kept)
        aliases = alias_classes(self._module)
        names = {alias for name in changed_tensors(analysis, choice) for alias in aliases.of(name)}
        sites = {s.node: s for s in find_sites(self.program)}
        changed = dict.fromkeys((*readers(self.program.graph, names), *changed_nodes(analysis, choice)))
        before = {n: record(n, sites.get(n)) for n in changed}
        resize(self, analysis, choice, views=views)
        sites = {s.node: s for s in find_sites(self.program)}
        for node, old in before.items():
            self._journal(Action.RETYPED, why, old, record(node, sites.get(node)))

    def reweight(
        self, node: fx.Node, tensors: Mapping[str, Tensor], why: str, facts: Mapping[str, float] | None = None, site: WeightSite | None = None
    ) -> None:
        """Give tensors that `node` reads new values, under all their tied names, and journal it at this node; `site` is the node's, if it is one."""
        before = record(node, site)
        for name, tensor in tensors.items():
            old = get_tensor(self._module, name)
            if (tensor.shape, tensor.dtype) != (old.shape, old.dtype):
                raise EditError(f"reweight of {name}: expected {old.dtype} {list(old.shape)}, got {tensor.dtype} {list(tensor.shape)}")
            self.set_tensor(name, tensor)
        self._journal(Action.REWEIGHTED, why, before, record(node, site), facts)

    def untie(self, site: WeightSite) -> WeightSite:
        """Give the site a weight of its own, so that later edits leave the sites tied to it alone; returns the site as it stands then."""
        if site.compressed:
            raise EditError(f"untie at {site}: it holds {site.format.to_spec()}, which no later edit changes")
        name = self._own_name(site, "weight")
        weight = get_tensor(self._module, site.tensors[0])
        set_tensor(self._module, name, weight.detach().clone(), parameter=True)
        with self.program.graph.inserting_before(site.node):
            own = self.program.graph.get_attr(name)
        site.node.replace_input_with(next(n for n in site.node.all_input_nodes if n.op == "get_attr" and n.target == site.tensors[0]), own)
        self._journal(Action.ADDED, f"own copy of the weight tied to {', '.join(site.tied)}", None, replace(record(own), module=site.name))
        return replace(site, tensors=(name,), tied=())

    def compress(self, site: WeightSite, fmt: WeightFormat, payload: Mapping[str, Tensor], why: str, facts: Mapping[str, float] | None = None) -> fx.Node:
        """Replace the site's node by the fxpress operator that holds `payload` in `fmt`."""
        if (reason := why_not_compressible(site)) is not None:
            raise EditError(f"{site}: {reason}")
        return self._hold(site, fmt, payload, self._name, why, facts)

    def recompress(self, site: WeightSite, fmt: WeightFormat, payload: Mapping[str, Tensor], why: str, facts: Mapping[str, float] | None = None) -> fx.Node:
        """Hold a compressed site's weight in another format; the tensors get names of their own while others read the old ones."""
        return self._hold(site, fmt, payload, self._own_name, why, facts)

    def _hold(
        self,
        site: WeightSite,
        fmt: WeightFormat,
        payload: Mapping[str, Tensor],
        name: Callable[[WeightSite, str], str],
        why: str,
        facts: Mapping[str, float] | None,
    ) -> fx.Node:
        fmt.check_payload(payload, site.rows, site.columns, site.dtype, site.name)
        before, keys = record(site.node, site), fmt.payload_spec(site.rows, site.columns, site.dtype)
        ordered = self._shared(site, fmt, {key: payload[key] for key in keys})  # a payload read from a file may come in another order
        with self.program.graph.inserting_before(site.node):
            stored = [self._store(name(site, f"weight_{key}"), tensor) for key, tensor in ordered.items()]
            target, args = compressed_call(site, fmt, stored)
            node = self.program.graph.call_function(target, args)
        node.meta = dict(site.node.meta) | {"fxpress_site": site.name, "fxpress_dtype": site.dtype}
        self.replace(site.node, node)
        self.program.stage = Stage.COMPRESSED
        self._journal(Action.REPLACED, why, before, record(node, refreshed(node, site, fmt)), facts)
        return node

    def _shared(self, site: WeightSite, fmt: WeightFormat, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of an equal payload that an embedding (of a linear: a linear) holds already, so that tied weights stay one; else the payload itself."""
        other = {SiteKind.EMBEDDING: torch.ops.fxpress.linear.default}.get(site.kind, torch.ops.fxpress.embedding.default)
        for node in self.program.graph.nodes:
            if node.target is other and argument(node, "weight_format") == fmt.to_spec() and list(argument(node, "shape")) == [site.rows, site.columns]:
                held = dict(zip(payload, [get_tensor(self._module, str(n.target)) for n in argument(node, "payload")], strict=True))
                if all(not t.is_meta and held[k].dtype == t.dtype and torch.equal(held[k], t) for k, t in payload.items()):
                    return held
        return payload

    def _store(self, name: str, tensor: Tensor) -> fx.Node:
        set_tensor(self._module, name, tensor.detach(), parameter=False)
        return self.program.graph.get_attr(name)

    def factorize(self, site: WeightSite, chain: Chain, why: str, facts: Mapping[str, float] | None = None) -> None:
        """Replace a plain site by the chain of operators that its weight was factorized into; the factors are sites `<site>.<link>`, parameters of their own.

        The site's bias is added where the chain says. Shapes are propagated through the chain; `EditError` when it does not compute what the site's shape was.
        """
        if (reason := why_not_compressible(site)) is not None:
            raise EditError(f"factorize {site}: {reason}")
        before, old = record(site.node, site), site.node
        bias = argument(old, {SiteKind.ADDMM: "self"}.get(site.kind, "bias")) if site.kind is not SiteKind.MM else None
        x = site.data
        for link, added in calls(with_dtype(chain, site.dtype), bias):
            with self.program.graph.inserting_before(old):
                weight = self._factor(site, link) if isinstance(link, (Product, Convolution)) else None
                x = self.program.graph.call_function(*link.call(x, weight, added))
            take_place(x, old)
            if isinstance(link, (Product, Convolution)):
                x.meta["fxpress_site"] = f"{site.name}.{link.name}"
        if node_type(x) != node_type(old):
            raise EditError(f"factorize {site}: the chain makes {node_type(x)}, expected {node_type(old)}")
        self.replace(old, x)
        self._journal(Action.REPLACED, why, before, replace(record(x), parameters=parameters(chain)), facts)

    def _factor(self, site: WeightSite, link: Product | Convolution) -> fx.Node:
        name = self._name(site, f"{link.name}.weight")
        own = link.weight.clone(memory_format=torch.contiguous_format)  # strides of a transpose would pass for another memory format of the outputs
        set_tensor(self._module, name, own, parameter=True)
        node = self.program.graph.get_attr(name)
        with fake_mode_of(site.data):
            node.meta["val"] = torch.empty(link.weight.shape, dtype=link.weight.dtype, device=site.data.meta["val"].device)
        return node

    def decompress(self, site: WeightSite, why: str) -> fx.Node:
        """Replace a compressed site by the plain operator on its decoded weight."""
        before = record(site.node, site)
        with self.program.graph.inserting_before(site.node):
            weight = self._store(self._own_name(site, "weight"), site.matrix().reshape(site.shape))
            node = self.program.graph.call_function(*plain_call(site, weight))
        node.meta = {k: v for k, v in site.node.meta.items() if k != "fxpress_dtype"}
        self.replace(site.node, node)
        self._journal(Action.REPLACED, why, before, record(node, refreshed(node, site, Dense())))
        return node

    def lower(self, site: WeightSite, target: Any, stored: Mapping[str, Tensor], rest: tuple[Any, ...], why: str) -> fx.Node:
        """Replace a compressed site by a code generator's operator `target(data, [stored tensors], *rest)`; the tensors are named `<site>.<key>`."""
        before = record(site.node, site)
        with self.program.graph.inserting_before(site.node):
            tensors = [self._store(self._name(site, key), tensor) for key, tensor in stored.items()]
            node = self.program.graph.call_function(target, (site.data, tensors, *rest))
        node.meta = {k: v for k, v in site.node.meta.items() if k not in ("fxpress_dtype", "fxpress_site")}
        self.replace(site.node, node)
        self._journal(Action.REPLACED, why, before, replace(record(node), module=site.name))
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new`, note the provenance, erase `old`."""
        new.meta["from_node"] = [NodeSource(old, self.pass_spec, [NodeSourceAction.REPLACE, NodeSourceAction.CREATE])]
        name = old.name
        old.replace_all_uses_with(new)
        self.program.graph.erase_node(old)
        new.name = name if new.name != name else new.name

    def exchange(self, old: fx.Node, new: fx.Node, why: str) -> None:
        """`replace`, and remove what only `old` needed, all journalled."""
        before = record(old)
        self.replace(old, new)
        self._journal(Action.REPLACED, why, before, record(new))
        self._drop_dead(why)

    def bypass(self, node: fx.Node, source: fx.Node, why: str) -> None:
        """Remove `node` and let its users read `source`; of a node with several results, those who took the first one."""
        before = record(node)
        for taker in [u for u in node.users if u.target is operator.getitem]:
            if taker.users and taker.args[1] != 0:
                raise EditError(f"bypass of {node.name}: result {taker.args[1]} is used by {', '.join(u.name for u in taker.users)}")
            taken = record(taker)
            taker.replace_all_uses_with(source)
            self.program.graph.erase_node(taker)
            self._journal(Action.REMOVED, why, taken, None)
        node.replace_all_uses_with(source)
        self.program.graph.erase_node(node)
        self._journal(Action.REMOVED, why, before, None)

    def drop_branch(self, node: fx.Node, stream: fx.Node, why: str) -> None:
        """Let the users of `node` read `stream`, and remove everything that only `node` needed, each node journalled."""
        self.bypass(node, stream, why)
        self._drop_dead(why)

    def _drop_dead(self, why: str) -> None:
        sites = {s.node: s for s in find_sites(self.program)}
        for dead in reversed(list(self.program.graph.nodes)):
            if dead.op == "call_function" and not dead.users:
                self._journal(Action.REMOVED, why, record(dead, sites.get(dead)), None)
                self.program.graph.erase_node(dead)

    def set_bias(self, site: WeightSite, bias: Tensor, why: str) -> None:
        """Give a linear, addmm or conv site a bias `[N]`, replacing the stored one it has; sites that share the old bias keep it."""
        if (reason := why_no_bias(site, bias)) is not None:
            raise EditError(f"set_bias at {site}: {reason}")
        before = record(site.node, site)
        if site.bias is not None and self._readers(site.bias) == 1:
            self.set_tensor(site.bias, bias.to(site.dtype))
        else:
            with self.program.graph.inserting_before(site.node):
                stored = self._store(self._own_name(site, "bias"), bias.to(site.dtype))
            place = bias_place(site)
            site.node.args = (*site.node.args[:place], stored, *site.node.args[place + 1 :])
        self._journal(Action.REWEIGHTED, why, before, record(site.node, site))

    def _readers(self, name: str) -> int:
        """How many uses the tensor has under all its names."""
        names = alias_classes(self._module).of(name)
        return sum(len(n.users) for n in self.program.graph.nodes if n.op == "get_attr" and n.target in names)

    def _own_name(self, site: WeightSite, leaf: str) -> str:
        """Name of a tensor of this site alone: `<site>.<leaf>`, or `<site>.own_<leaf>` while a node reads something of that name."""
        name = self._name(site, leaf)
        read = any(n.op == "get_attr" and n.target == name and n.users for n in self.program.graph.nodes)
        return self._name(site, f"own_{leaf}") if read else name

    def _name(self, site: WeightSite, leaf: str) -> str:
        """`<site>.<leaf>`; `<site>_codes` and so on when the site is called after a bare parameter, which can hold nothing below it."""
        bare = any(name == site.name for name, _ in named_tensors(self._module))
        return f"{site.name}_{leaf.removeprefix('weight_')}" if bare else f"{site.name}.{leaf}"

    def finish(self) -> None:
        """Drop dead weight reads and unused tensors, check the graph and recompile."""
        graph = self.program.graph
        for node in reversed(list(graph.nodes)):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))  # fx takes attention for impure
        used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        for name in [n for n, _ in named_tensors(self._module) if n not in used]:
            delete_tensor(self._module, name)
        graph.lint()
        self._module.recompile()

    def stored(self, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        """A read of a new buffer `name` at the graph's insertion point; `like` is a node with a value, for its device. A buffer of that name is read again."""
        known = dict(named_tensors(self._module))
        if name not in known:
            set_tensor(self._module, name, tensor.to(like.meta["val"].device), parameter=False)
        node = self.program.graph.get_attr(name)
        with fake_mode_of(like):
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=like.meta["val"].device)
        return node

    def added(self, after: NodeRecord, why: str) -> None:
        """Journal a node that came in."""
        self._journal(Action.ADDED, why, None, after)

    def retyped(self, before: NodeRecord, node: fx.Node, why: str) -> None:
        """Journal a node whose type changed in place."""
        self._journal(Action.RETYPED, why, before, record(node))

    def _journal(self, action: Action, why: str, before: NodeRecord | None, after: NodeRecord | None, facts: Mapping[str, float] | None = None) -> None:
        self.program.journal.add(Change(pass_spec=self.pass_spec, action=action, why=why, before=before, after=after, facts=dict(facts or {})))


def record(node: fx.Node, site: WeightSite | None = None) -> NodeRecord:
    """The node as data, with its weight's format, parameters and bytes when it is a site."""
    return NodeRecord(
        name=node.name,
        op=op_name(node),
        module=site.name if site else module_path(node),
        type=str(node_type(node) or ""),
        inputs=tuple(n.name for n in node.all_input_nodes if n.op != "get_attr"),
        format=site.format.to_spec() if site else "",
        parameters=site.parameters if site else 0,
        nbytes=site.nbytes if site else 0,
    )


def record_all(program: Program) -> tuple[NodeRecord, ...]:
    """Every node but the weight reads, in graph order."""
    sites = {s.node: s for s in find_sites(program)}
    return tuple(record(n, sites.get(n)) for n in program.graph.nodes if n.op != "get_attr")
