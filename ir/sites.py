"""`WeightSite`: one view on every place where a weight meets data, whatever operator does it."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from . import ops  # noqa: F401  (registers torch.ops.fxpress)
from .errors import EditError
from .formats.base import WeightFormat, name_payload, parse_format
from .formats.dense import Dense
from .nodes import argument, get_tensor, module_path
from .weights import AliasClasses, alias_classes

if TYPE_CHECKING:
    from .program import Program

aten = torch.ops.aten
OWN_WEIGHT = ".own_weight"  # ends the name of a weight that an edit made for one site while others keep the old one


class SiteKind(Enum):
    """What the site computes."""

    LINEAR = "linear"  # weight [N, K]
    ADDMM = "addmm"  # weight [K, N], bias added
    MM = "mm"  # weight [K, N]
    CONV1D = "conv1d"  # weight [O, I/groups, k]
    CONV2D = "conv2d"  # weight [O, I/groups, kh, kw]
    CONV3D = "conv3d"  # weight [O, I/groups, kd, kh, kw]
    EMBEDDING = "embedding"  # weight [V, D]


CONVOLUTIONS = (SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D)


@dataclass(frozen=True)
class _Operator:
    kind: SiteKind
    data: str
    weight: str
    bias: str | None


_PLAIN: dict[Any, _Operator] = {
    aten.linear.default: _Operator(SiteKind.LINEAR, "input", "weight", "bias"),
    aten.addmm.default: _Operator(SiteKind.ADDMM, "mat1", "mat2", "self"),
    aten.mm.default: _Operator(SiteKind.MM, "self", "mat2", None),
    aten.matmul.default: _Operator(SiteKind.MM, "self", "other", None),
    aten.conv1d.default: _Operator(SiteKind.CONV1D, "input", "weight", "bias"),
    aten.conv1d.padding: _Operator(SiteKind.CONV1D, "input", "weight", "bias"),
    aten.conv2d.default: _Operator(SiteKind.CONV2D, "input", "weight", "bias"),
    aten.conv2d.padding: _Operator(SiteKind.CONV2D, "input", "weight", "bias"),
    aten.conv3d.default: _Operator(SiteKind.CONV3D, "input", "weight", "bias"),
    aten.conv3d.padding: _Operator(SiteKind.CONV3D, "input", "weight", "bias"),
    aten.embedding.default: _Operator(SiteKind.EMBEDDING, "indices", "weight", None),
}
_COMPRESSED: dict[Any, _Operator] = {
    torch.ops.fxpress.linear.default: _Operator(SiteKind.LINEAR, "x", "payload", "bias"),
    torch.ops.fxpress.conv.default: _Operator(SiteKind.CONV2D, "x", "payload", "bias"),
    torch.ops.fxpress.embedding.default: _Operator(SiteKind.EMBEDDING, "indices", "payload", None),
}


@dataclass(frozen=True)
class WeightSite:
    """A node that multiplies data by a stored weight (or looks rows of it up).

    `shape` is the weight's shape as its operator takes it. `to_matrix` views it as `[N, K]`: N outputs (embedding: vocabulary rows), K inputs
    (conv: `I/groups * kernel`). `tensors` are the stored names: the weight's, or a payload's in format order. `tied` names the
    other sites that read the same storage.
    """

    name: str
    kind: SiteKind
    node: fx.Node = field(repr=False)
    tensors: tuple[str, ...]
    bias: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: WeightFormat
    groups: int = 1
    tied: tuple[str, ...] = ()

    @property
    def data(self) -> fx.Node:
        """The node whose value the weight meets, as the graph stands now: edits of earlier sites replace nodes."""
        return argument(self.node, (_PLAIN | _COMPRESSED)[self.node.target].data)

    @property
    def compressed(self) -> bool:
        """Whether the site is an fxpress operator with a payload."""
        return self.node.target in _COMPRESSED

    @property
    def transposed(self) -> bool:
        """Whether the stored weight is `[K, N]` (addmm, mm)."""
        return self.kind in (SiteKind.ADDMM, SiteKind.MM)

    @property
    def out_axis(self) -> int:
        """Axis of `shape` that is the output."""
        return 1 if self.transposed else 0

    @property
    def in_axis(self) -> int:
        """Axis of `shape` that meets the data (conv: the first of several)."""
        return 0 if self.transposed else 1

    @property
    def rows(self) -> int:
        """N of the matrix view."""
        return self.shape[self.out_axis]

    @property
    def columns(self) -> int:
        """K of the matrix view."""
        return prod(self.shape) // self.rows

    @property
    def parameters(self) -> int:
        """Weights the site holds."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the weight."""
        return self.format.nbytes(self.rows, self.columns, self.dtype)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as `[N, K]` (a view where possible)."""
        return weight.t() if self.transposed else weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `to_matrix`, contiguous."""
        return matrix.t().contiguous() if self.transposed else matrix.reshape(self.shape).contiguous()

    def matrix(self) -> Tensor:
        """The weight as `[N, K]`, decoded when compressed."""
        module = self.node.graph.owning_module
        assert module is not None
        if self.compressed:
            return self.format.decode(self.payload(), self.rows, self.columns, self.dtype)
        return self.to_matrix(get_tensor(module, self.tensors[0]).detach())

    def bias_vector(self) -> Tensor:
        """The stored bias `[N]`, zeros for a site without one, in float64."""
        module = self.node.graph.owning_module
        assert module is not None
        return get_tensor(module, self.bias).detach().double() if self.bias else torch.zeros(self.rows, dtype=torch.float64)

    def payload(self) -> dict[str, Tensor]:
        """Stored tensors by their format names (a plain site: its weight as dense `values`)."""
        module = self.node.graph.owning_module
        assert module is not None
        if not self.compressed:
            return {"values": self.matrix()}
        tensors = [get_tensor(module, t) for t in self.tensors]
        return name_payload(self.format, tensors, self.rows, self.columns, self.dtype)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind.value} {list(self.shape)})"


def find_sites(program: Program) -> tuple[WeightSite, ...]:
    """All weight sites in graph order, with tied ones named."""
    aliases = alias_classes(program.graph_module)
    found = [s for node in program.graph.nodes if (s := _site(node, aliases)) is not None]
    by_storage: dict[str, list[str]] = defaultdict(list)
    named = _unique_names(found)
    for site in named:
        by_storage[aliases.of(site.tensors[0])[0]].append(site.name)
    return tuple(_with_tied(s, by_storage[aliases.of(s.tensors[0])[0]]) for s in named)


def name_sites(program: Program) -> None:
    """Write every site's name into its node, so that it stays the same whatever later edits do to the weights. Called once, at capture."""
    for site in find_sites(program):
        site.node.meta["fxpress_site"] = site.name
        if site.compressed:
            site.node.meta["fxpress_dtype"] = site.dtype


def site_named(program: Program, name: str) -> WeightSite:
    """The site called `name`."""
    for site in program.sites():
        if site.name == name:
            return site
    raise EditError(f"no weight site is called {name!r}; `fxpress show` lists them")


def _with_tied(site: WeightSite, names: list[str]) -> WeightSite:
    return replace(site, tied=tuple(n for n in names if n != site.name))


def _unique_names(sites: list[WeightSite]) -> list[WeightSite]:
    """Number the later of several new sites of one name (`name#2`); a site keeps the name that its node carries since capture or compression."""
    taken = {s.name for s in sites if "fxpress_site" in s.node.meta}
    out = []
    for site in sites:
        if "fxpress_site" not in site.node.meta:
            numbered = (f"{site.name}#{i}" for i in count(2))
            site = site if site.name not in taken else replace(site, name=next(n for n in numbered if n not in taken))
            taken.add(site.name)
        out.append(site)
    return out


def _site(node: fx.Node, aliases: AliasClasses) -> WeightSite | None:
    if node.op != "call_function":
        return None
    if node.target in _COMPRESSED:
        return _compressed_site(node, _COMPRESSED[node.target])
    operator = _PLAIN.get(node.target)
    if operator is None:
        return None
    weight = argument(node, operator.weight)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return _plain_site(node, operator, str(weight.target), aliases)


def _plain_site(node: fx.Node, operator: _Operator, weight: str, aliases: AliasClasses) -> WeightSite | None:
    module = node.graph.owning_module
    assert module is not None
    tensor = get_tensor(module, weight)
    if tensor.dim() < 2 or not tensor.is_floating_point() or (operator.kind is SiteKind.MM and tensor.dim() != 2):
        return None
    return WeightSite(
        name=node.meta.get("fxpress_site") or _site_name(node, aliases.of(weight), weight),
        kind=operator.kind,
        node=node,
        tensors=(weight,),
        bias=_attribute_name(argument(node, operator.bias)) if operator.bias else None,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        format=Dense(),
        groups=argument(node, "groups") or 1,
    )


def _compressed_site(node: fx.Node, operator: _Operator) -> WeightSite:
    payload = argument(node, "payload")
    names = tuple(str(p.target) for p in payload)
    shape = tuple(argument(node, "shape"))
    kind = {3: SiteKind.CONV1D, 4: SiteKind.CONV2D, 5: SiteKind.CONV3D}[len(shape)] if operator.kind is SiteKind.CONV2D else operator.kind
    return WeightSite(
        name=node.meta.get("fxpress_site") or re.sub(r"(\.weight)?_[^_.]+$", "", names[0]),
        kind=kind,
        node=node,
        tensors=names,
        bias=_attribute_name(argument(node, operator.bias)) if operator.bias else None,
        shape=shape,
        dtype=node.meta.get("fxpress_dtype") or node.meta["val"].dtype,
        format=parse_format(argument(node, "weight_format")),
        groups=argument(node, "groups") or 1,
    )


def _attribute_name(node: Any) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _site_name(node: fx.Node, names: tuple[str, ...], used: str) -> str:
    """The weight's name without `.weight` if the node was traced in (or above) its owner, else, for a tied weight, the module it was traced in."""
    path = module_path(node)
    below = [n for n in (used, *names) if not path or n.startswith(f"{path}.")]
    name = next((n for n in below if n.rpartition(".")[0] == path), below[0] if below else path)
    return name.removesuffix(".weight").removesuffix(OWN_WEIGHT)
