"""Chains: what a factorized weight becomes, a row of plain operators whose weights are sites again.

Low-rank pairs, matrix product operators, Tucker and CP convolutions and one-way filters are all chains. No chain holds an einsum: a link multiplies, convolves,
or moves axes, so that every later pass and every target knows what to do with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
CONVS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}  # by the dimensions of the weight


@dataclass(frozen=True, kw_only=True)
class Product:
    """A linear with `weight: [N, K]`, called `<site>.<name>`."""

    name: str
    weight: Tensor

    def call(self, x: Any, weight: Any, bias: Any) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return aten.linear.default, (x, weight, bias)


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution with `weight: [O, I / groups, *k]` of up to three axes, called `<site>.<name>`."""

    name: str
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def call(self, x: Any, weight: Any, bias: Any) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return CONVS[self.weight.dim()], (x, weight, bias, list(self.stride), list(self.padding), list(self.dilation), self.groups)


@dataclass(frozen=True, kw_only=True)
class Unflatten:
    """The last axis becomes several of these `sizes`."""

    sizes: tuple[int, ...]

    def call(self, x: Any, weight: Any = None, bias: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return aten.unflatten.int, (x, -1, list(self.sizes))


@dataclass(frozen=True, kw_only=True)
class Flatten:
    """The last `count` axes become one."""

    count: int = 2

    def call(self, x: Any, weight: Any = None, bias: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return aten.flatten.using_ints, (x, -self.count, -1)


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Two axes, counted from the end (-1 is the last), change places."""

    first: int = -2
    second: int = -1

    def call(self, x: Any, weight: Any = None, bias: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return aten.transpose.int, (x, self.first, self.second)


@dataclass(frozen=True, kw_only=True)
class Pad:
    """`count` zeros behind the last axis."""

    count: int

    def call(self, x: Any, weight: Any = None, bias: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return aten.constant_pad_nd.default, (x, [0, self.count], 0.0)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The first `size` of the last axis."""

    size: int

    def call(self, x: Any, weight: Any = None, bias: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return aten.slice.Tensor, (x, -1, 0, self.size)


@dataclass(frozen=True, kw_only=True)
class AddBias:
    """The site's bias is added here, because the last weight does not make the site's channels; left out where there is none."""

    def call(self, x: Any, weight: Any = None, bias: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """Operator and arguments."""
        return aten.add.Tensor, (x, bias)


Weighted = Product | Convolution
Link = Weighted | Unflatten | Flatten | Swap | Pad | Cut | AddBias
Chain = tuple[Link, ...]
_KINDS: dict[str, type[Any]] = {c.__name__: c for c in (Product, Convolution, Unflatten, Flatten, Swap, Pad, Cut, AddBias)}


def weighted(chain: Sequence[Link]) -> list[Weighted]:
    """The links that hold weights, in order."""
    return [link for link in chain if isinstance(link, (Product, Convolution))]


def parameters(chain: Sequence[Link]) -> int:
    """Weights of the chain, biases not counted."""
    return sum(link.weight.numel() for link in weighted(chain))


def calls(chain: Sequence[Link], bias: Any) -> Iterator[tuple[Link, Any]]:
    """Every link with the bias it adds: the site's own, at `AddBias` or else at the last weight."""
    adding = next((link for link in chain if isinstance(link, AddBias)), None) or next(iter(reversed(weighted(chain))), None)
    for link in chain:
        if bias is not None or not isinstance(link, AddBias):
            yield link, bias if link is adding else None


def run(chain: Sequence[Link], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the chain computes; `bias: [N]` is added at `AddBias`, or by the last weight."""
    for link, added in calls(chain, bias):
        target, args = link.call(x, getattr(link, "weight", None), added)
        x = target(*args)
    return x


def with_dtype(chain: Sequence[Link], dtype: torch.dtype) -> Chain:
    """The chain with all weights in `dtype`."""
    return tuple(replace(link, weight=link.weight.to(dtype)) if isinstance(link, (Product, Convolution)) else link for link in chain)


def to_json(chain: Sequence[Link]) -> str:
    """Everything but the weights' values, as text."""
    links = [{k: v for k, v in asdict(link).items() if k != "weight"} | {"kind": type(link).__name__} for link in chain]
    return json.dumps(links)


def from_json(text: str, weights: Mapping[str, Tensor]) -> Chain:
    """Inverse of `to_json`, with the weights by their links' names."""
    made = []
    for data in json.loads(text):
        kind = _KINDS[data.pop("kind")]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        made.append(kind(**fields, **({"weight": weights[data["name"]]} if "name" in data else {})))
    return tuple(made)
