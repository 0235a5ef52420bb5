"""Feed-forward networks: linear sites, element-wise operators, a linear site."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ..atoms import Atom, leaves, size_of
from ..axes import AxisClass
from ..sites import WeightSite
from .flow import LINEAR, SAME, Flow, short_name

ACTIVATIONS = (
    "gelu", "silu", "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "mish", "softplus", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh",
    "prelu", "_prelu_kernel", "log_sigmoid", "rrelu", "glu", "erf", "sin", "exp",
)  # fmt: skip
_LINEAR_OPS = SAME | {"aten.add"}  # between two linear sites these leave one linear map: a low-rank pair, not a hidden layer
_CUTS = {"aten.slice", "aten.narrow", "aten.select"}


@dataclass(frozen=True)
class FeedForward:
    """Sites `ups` make the classes `hiddens`, `down` sums over them.

    Gated: the product of `gate` (the branch with the activation) and `up`, which are one site when fused. `activation` is the operator's name, None for none.
    """

    up: WeightSite
    gate: WeightSite | None
    down: WeightSite
    ups: tuple[WeightSite, ...]
    hiddens: tuple[AxisClass, ...]
    activation: str | None

    @property
    def hidden(self) -> AxisClass:
        """The only hidden class, or the first."""
        return self.hiddens[0]

    @property
    def sites(self) -> tuple[WeightSite, ...]:
        """All sites, each once, in graph order."""
        return tuple(dict.fromkeys((*self.ups, self.down)))

    @property
    def fused(self) -> bool:
        """Whether one site makes gate and up."""
        return self.gate is not None and self.gate == self.up

    def __str__(self) -> str:
        return f"feed-forward into {self.down.name}"


@dataclass(frozen=True)
class _Half:
    """A factor of a gated product: where its values come from (a site, or one cut of a site's output) and the operators on the way."""

    site: WeightSite | None
    origins: frozenset[fx.Node]
    passed: tuple[fx.Node, ...] = field(repr=False)


def find_feed_forwards(flow: Flow, taken: set[Atom]) -> tuple[FeedForward, ...]:
    """All feed-forward networks in graph order; classes of `taken` (residual streams, attention) are not hidden layers."""
    found = (_feed_forward(flow, down, taken) for down in flow.sites.values() if down.kind in LINEAR)
    return tuple(one for one in found if one is not None)


def _feed_forward(flow: Flow, down: WeightSite, taken: set[Atom]) -> FeedForward | None:
    wanted = flow.in_leaves(down) - taken - flow.out_leaves(down)
    if not flow.classes(wanted):
        return None
    passed, ends = flow.walk_back(down.data, flow.is_end)
    ups = sorted((flow.sites[n] for n in ends if n in flow.sites and flow.out_leaves(flow.sites[n]) & wanted), key=lambda s: flow.index[s.node])
    hiddens = flow.classes(wanted & flow.out_leaves(*ups) - flow.in_leaves(*ups))
    if not hiddens or any(s.kind not in LINEAR for s in ups) or all(short_name(n) in _LINEAR_OPS for n in passed):
        return None
    gate, up = _halves(flow, passed, down) or (None, ups[0])
    return FeedForward(up, gate, down, tuple(ups), hiddens, _activation(passed))


def _halves(flow: Flow, passed: list[fx.Node], down: WeightSite) -> tuple[WeightSite, WeightSite] | None:
    """`(gate, up)` of the product nearest to `down` whose factors have nothing in common."""
    for node in passed:
        factors = flow.live_inputs(node) if short_name(node) == "aten.mul" else []
        if len(factors) != 2:
            continue
        a, b = (_half(flow, f, size_of(flow.in_axis(down))) for f in factors)
        if a.site is None or b.site is None or a.origins & b.origins:
            continue
        return (b.site, a.site) if _activation(b.passed) and not _activation(a.passed) else (a.site, b.site)
    return None


def _half(flow: Flow, factor: fx.Node, size: int) -> _Half:
    """Origins are sites, and cuts of their output: the halves of a fused projection differ in these."""
    passed, ends = flow.walk_back(factor, lambda n: flow.is_end(n) or _is_cut(n))
    sites = [flow.sites[n] for n in ends if n in flow.sites] or [s for n in ends if _is_cut(n) for s in flow.writers(n)]
    return _Half(next(iter(sites), None), frozenset(ends), tuple(passed))


def _is_cut(node: fx.Node) -> bool:
    return short_name(node) in _CUTS or (short_name(node) == "getitem" and "norm" not in short_name(node.args[0]))  # type: ignore[arg-type]


def _activation(passed: list[fx.Node] | tuple[fx.Node, ...]) -> str | None:
    names = {short_name(n).removeprefix("aten.") for n in passed}
    return next((a for a in ACTIVATIONS if a in names), None)


def hidden_leaves(flow: Flow, found: tuple[FeedForward, ...]) -> set[Atom]:
    """Leaves of all hidden classes."""
    return {leaf for one in found for hidden in one.hiddens for leaf in leaves((hidden.atom,))}
