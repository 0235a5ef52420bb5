"""Which tensors of the user's model change, and to what, so that it computes what a compressed program computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..ir.errors import LowerError
from ..ir.nodes import get_tensor, module_path
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.weights import alias_classes, named_tensors
from .graph_match import WAY_OUT, GraphMatch
from .tensor_files import same_values

Place = tuple[str, str]


@dataclass(frozen=True)
class CompressedPlace:
    """A weight to be held compressed: the program's site, its bias, and whether the model stores the weight as `[K, N]`."""

    site: WeightSite
    bias: Tensor | None
    transposed: bool


@dataclass(frozen=True)
class AttachPlan:
    """New dense tensors and compressed weights by `(module path, attribute)`."""

    dense: dict[Place, Tensor]
    compressed: dict[Place, CompressedPlace]


def plan_attach(model: nn.Module, original: Program, program: Program, match: GraphMatch, *, keep_decoded: bool) -> AttachPlan:
    """Map every changed tensor of `program` to the model; `keep_decoded` maps compressed weights to their dense values. `LowerError` names what cannot be."""
    planner = _Planner(model, original, program)
    for old, new in match.sites:
        planner.take_site(old, new, keep_decoded)
    for read in match.reads:
        planner.take_read(*read)
    return planner.finish()


class _Planner:
    def __init__(self, model: nn.Module, original: Program, program: Program) -> None:
        self.original, self.program = original.graph_module, program.graph_module
        self.tensors = dict(named_tensors(model))
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), path)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.aliases = alias_classes(model)
        self.dense: dict[str, Tensor] = {}
        self.compressed: dict[str, CompressedPlace] = {}
        self.changed: list[str] = []

    def take_site(self, old: WeightSite, new: WeightSite, keep_decoded: bool) -> None:
        name = self._weight_of(old)
        if name is None:
            return self._refuse_changed(old, new)
        own = self._bias_of(old, _split(name)[0])
        bias = None if new.bias is None else get_tensor(self.program, new.bias)
        if new.compressed and not keep_decoded:
            return self._claim_compressed(name, CompressedPlace(new, bias, old.transposed))
        self._claim(name, self._dense_weight(old, new), f"site {old}")
        if bias is not None:
            self._claim(own, bias, f"site {old}", tied=False)
        return None

    def take_read(self, old: str, new: str) -> None:
        """A tensor that another operator reads: a norm's weight, a position table, a mask."""
        tensor, captured = get_tensor(self.program, new), get_tensor(self.original, old)
        if old in self.tensors:
            self._require(old, old, f"tensor {old}")
            self._claim(self._first(old), tensor, f"tensor {old}")
        elif not same_values(tensor, captured):
            raise LowerError(f"attach: the constant {old} changed and is no tensor of the model; {WAY_OUT}")

    def finish(self) -> AttachPlan:
        """New values go to every tied name that nothing else speaks for; what the model already holds is left alone."""
        for name in self.changed:
            for alias in map(self._first, self.aliases.of(name)):
                if alias not in self.compressed and self.tensors[alias].shape == self.tensors[name].shape:
                    self.dense.setdefault(alias, self.dense[name])
        if both := sorted(set(self.dense) & set(self.compressed)):
            raise LowerError(f"attach: the weight {both[0]} is compressed at one site and read dense at another; {WAY_OUT}, or untie them first")
        needed = {n: t for n, t in self.dense.items() if n not in self.tensors or not same_values(t, self.tensors[n])}
        return AttachPlan({_split(n): t for n, t in needed.items()}, {_split(n): c for n, c in self.compressed.items()})

    def _weight_of(self, site: WeightSite) -> str | None:
        """The model's name of a site's weight, of several tied ones that below the module which uses it; None for a constant that capture made."""
        used = site.tensors[0]
        leaf, name = used.rpartition(".")[2], site.name.partition("#")[0]
        known = [n for n in (_join(module_path(site.node), leaf), _join(name, "weight"), name, used) if n in self.tensors]
        fitting = next((n for n in known if self._holds(n, used)), None)
        if known and fitting is None:
            self._require(known[-1], used, f"site {site}")
        return fitting and self._first(fitting)

    def _bias_of(self, site: WeightSite, owner: str) -> str:
        """The model's name for the site's bias; a bias that the module does not hold as its own is refused."""
        own = _join(owner, "bias")
        if site.bias is not None and own not in self.tensors:
            raise LowerError(f"attach: site {site}: its bias {site.bias} is not {own} of the model; {WAY_OUT}")
        if site.bias is not None:
            self._require(own, site.bias, f"site {site}")
        return self._first(own)

    def _first(self, name: str) -> str:
        """The tensor's name below the first name of its module: a module may stand in the model under several."""
        owner, leaf = _split(name)
        return _join(self.paths[id(self.modules[owner])], leaf)

    def _holds(self, name: str, captured: str) -> bool:
        return same_values(self.tensors[name], get_tensor(self.original, captured))

    def _require(self, name: str, captured: str, where: str) -> None:
        if not self._holds(name, captured):
            raise LowerError(f"attach: {where}: {name} of the model has other values than were captured; pass the model the program was captured from")

    def _refuse_changed(self, old: WeightSite, new: WeightSite) -> None:
        """A site whose weight the model does not hold (a constant that capture made) must be as it was."""
        before = get_tensor(self.original, old.tensors[0])
        if new.compressed or new.bias != old.bias or not same_values(before, get_tensor(self.program, new.tensors[0])):
            raise LowerError(f"attach: site {old}: the model holds no parameter or buffer with its weight {old.tensors[0]}; {WAY_OUT}")

    def _dense_weight(self, old: WeightSite, new: WeightSite) -> Tensor:
        """The site's weight as the model's module stores it."""
        if old.node.target == new.node.target:
            return get_tensor(self.program, new.tensors[0])
        matrix = new.matrix()
        if old.transposed:
            return matrix.t()
        return matrix if new.transposed else matrix.reshape(new.shape)

    def _claim(self, name: str, tensor: Tensor, where: str, *, tied: bool = True) -> None:
        if name in self.dense and not same_values(self.dense[name], tensor):
            raise LowerError(f"attach: {where}: {name} of the model has other values at another place that uses it; {WAY_OUT}")
        self.dense[name] = tensor
        if tied and not same_values(tensor, self.tensors[name]):
            self.changed.append(name)

    def _claim_compressed(self, name: str, place: CompressedPlace) -> None:
        """A module called twice has two sites: they must hold the same payload."""
        other = self.compressed.setdefault(name, place).site
        site = place.site
        if other.format != site.format or not all(map(same_values, other.payload().values(), site.payload().values())):
            raise LowerError(f"attach: sites {other.name} and {site.name} are one weight, {name}, compressed in two ways; {WAY_OUT}")


def _split(name: str) -> Place:
    owner, _, leaf = name.rpartition(".")
    return owner, leaf


def _join(owner: str, leaf: str) -> str:
    return f"{owner}.{leaf}" if owner else leaf
