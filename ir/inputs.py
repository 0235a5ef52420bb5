"""The inputs of a program: example values, their pytree, and which axes are dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .errors import CaptureError

T = TypeVar("T")
PLUS = " + "


@dataclass(frozen=True)
class DynamicAxis:
    """One axis that may vary: its symbol's name and inclusive range (`high` None: unbounded). The axis `new + past` is as long as those two together."""

    name: str
    low: int = 1
    high: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the axes whose sizes add up to this one's; its own name alone where it is free."""
        return tuple(self.name.split(PLUS))


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword example inputs, and per flattened leaf the dynamic axes (`{axis: DynamicAxis}`).

    `caches`: keywords of inputs that earlier calls returned (keys and values of attention). A call may leave them out: then they are empty. Their fixed axes
    follow the model when it is made smaller.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: tuple[Mapping[int, DynamicAxis], ...] = ()
    caches: tuple[str, ...] = ()

    @property
    def leaves(self) -> list[Any]:
        """Flattened example values, in placeholder order."""
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def keywords(self) -> list[str | None]:
        """For every leaf the keyword that it comes by; None for positional ones."""
        return [None] * len(pytree.tree_leaves(self.args)) + [k for k, v in self.kwargs.items() for _ in pytree.tree_leaves(v)]

    @property
    def cache_leaves(self) -> tuple[int, ...]:
        """Places of the caches' tensors among the leaves."""
        return tuple(i for i, key in enumerate(self.keywords) if key in self.caches)

    @property
    def cached(self) -> list[Tensor]:
        """The caches' example tensors."""
        leaves = self.leaves
        return [leaves[i] for i in self.cache_leaves]

    def completed(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of a call with the caches it leaves out, empty: axes that the call gives no size have none."""
        missing = [k for k in self.caches if k not in kwargs]
        if not missing:
            return dict(kwargs)
        given = {k: v for k, v in kwargs.items() if k in self.kwargs}
        sizes = {d.name: v.shape[a] for k, v in given.items() for axes, v in self._axes(k, v) for a, d in axes.items() if isinstance(v, Tensor) and a < v.dim()}
        device = next((v.device for v in pytree.tree_leaves(dict(kwargs)) if isinstance(v, Tensor)), None)
        return dict(kwargs) | {k: self._empty(k, sizes, device) for k in missing}

    def longest(self, axis: str) -> int | None:
        """The largest size of the dynamic axis of this name; None where there is no such axis, or no limit."""
        return next((a.high for axes in self.dynamic for a in axes.values() if a.name == axis and a.high is not None), None)

    def sized(self, sizes: Mapping[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call with dynamic axes of other sizes, by name: values are repeated or left out at the end."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        known = {d.name: leaf.shape[a] for leaf, axes in zip(leaves, self.dynamic, strict=False) for a, d in axes.items()} | dict(sizes)
        for i, axes in enumerate(self.dynamic):
            for axis, one in axes.items():
                places = torch.arange(sum(known[part] for part in one.parts)) % max(1, leaves[i].shape[axis])
                leaves[i] = leaves[i].index_select(axis, places.to(leaves[i].device))
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    @property
    def start(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call as the first of a text: without caches."""
        if not self.caches:
            return self.args, self.kwargs
        places = set(self.cache_leaves)
        held = {d.name for i in places for d in self.dynamic[i].values()}
        own = {d.name for i, axes in enumerate(self.dynamic) if i not in places for d in axes.values()}
        args, kwargs = self.sized(dict.fromkeys(held - own, 0))
        return args, {k: v for k, v in kwargs.items() if k not in self.caches}

    def _axes(self, key: str, value: Any) -> list[tuple[Mapping[int, DynamicAxis], Any]]:
        """Dynamic axes and values of one keyword's leaves."""
        leaves = pytree.tree_leaves(value)
        mine = [axes for axes, k in zip(self.dynamic, self.keywords, strict=False) if k == key]
        return list(zip(mine or ({},) * len(leaves), leaves, strict=False))

    def _empty(self, key: str, sizes: Mapping[str, int], device: torch.device | None) -> Any:
        leaves, spec = pytree.tree_flatten(self.kwargs[key])
        shapes = [[sizes.get(axes[i].name, 0) if i in axes else s for i, s in enumerate(v.shape)] for axes, v in self._axes(key, self.kwargs[key])]
        return pytree.tree_unflatten([v.new_empty(s, device=device) for v, s in zip(leaves, shapes, strict=True)], spec)

    def to(self, device: torch.device | str) -> Inputs:
        """The same examples on another device."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def placed(self, values: T) -> T:
        """`values` with its tensors on the device of the examples (of their first tensor; without one, as they are)."""
        first = next((leaf for leaf in self.leaves if isinstance(leaf, Tensor)), None)
        placed: T = values if first is None else pytree.tree_map_only(Tensor, lambda t: t.to(first.device), values)
        return placed

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flatten a call's inputs like the examples; a different structure is refused with `ValueError`."""
        kwargs = self.completed(kwargs)
        if set(kwargs) != set(self.kwargs) or len(args) != len(self.args):
            raise ValueError(
                f"inputs: expected {len(self.args)} positional and keywords {sorted(self.kwargs)}, got {len(args)} positional and keywords {sorted(kwargs)}"
            )
        ordered = {k: kwargs[k] for k in self.kwargs}
        leaves, spec = pytree.tree_flatten((args, ordered))
        expected = pytree.tree_structure((self.args, self.kwargs))
        if spec != expected:
            raise ValueError(f"inputs: expected structure {expected}, got {spec}")
        return leaves

    def why_mismatch(self, leaves: list[Any]) -> str | None:
        """Reason why flattened `leaves` do not fit the examples' dtypes, ranks and fixed sizes, or None."""
        dynamic = self.dynamic or ({},) * len(leaves)
        for i, (got, want, axes) in enumerate(zip(leaves, self.leaves, dynamic, strict=True)):
            if isinstance(want, Tensor) and (reason := _why_tensor(got, want, axes)):
                return f"input {i}: {reason}"
            if not isinstance(want, Tensor) and (isinstance(got, Tensor) or got != want):
                return f"input {i}: expected the captured constant {want!r}, got {'a tensor' if isinstance(got, Tensor) else repr(got)}"
        return None

    def dynamic_shapes(self, forward: Callable[..., Any]) -> dict[str, Any] | None:
        """`dynamic_shapes` for `torch.export` of a module with this `forward`, or None when every axis is fixed."""
        if not any(self.dynamic):
            return None
        dims: dict[str, Any] = {}
        per_leaf = [{a: _dim(dims, d) for a, d in axes.items()} or None for axes in self.dynamic]
        spec = pytree.tree_structure((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(per_leaf, spec)
        return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


def _dim(dims: dict[str, Any], axis: DynamicAxis) -> Any:
    if len(axis.parts) > 1:
        return torch.export.Dim.AUTO  # the graph says how long it is
    if axis.name not in dims:
        dims[axis.name] = torch.export.Dim(axis.name, min=axis.low, max=axis.high)
    return dims[axis.name]


def _why_tensor(got: Any, want: Tensor, axes: Mapping[int, DynamicAxis]) -> str | None:
    if not isinstance(got, Tensor):
        return f"expected a tensor, got {type(got).__name__}"
    if got.dtype != want.dtype:
        return f"expected dtype {want.dtype}, got {got.dtype}"
    free = ["*" if i in axes else str(s) for i, s in enumerate(want.shape)]
    fits = got.dim() == want.dim() and all(i in axes or g == w for i, (g, w) in enumerate(zip(got.shape, want.shape, strict=True)))
    return None if fits else f"expected shape [{', '.join(free)}] (* is dynamic), got {list(got.shape)}; pass dynamic_shapes= at capture to vary an axis"


def as_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalise a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise CaptureError(f"example_inputs: expected a tensor, a tuple or a dict of keyword inputs, got {type(example_inputs).__name__}")


def dynamic_axes(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any, ranges: Mapping[Any, Any]) -> tuple[dict[int, DynamicAxis], ...]:
    """Dynamic axes of every leaf, read off the placeholders' symbolic sizes; names come from the user's `Dim`s where given."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = _given_names(placeholders, given, kwargs)
    return tuple(_axes_of(node.meta.get("val"), ranges, names) for node in placeholders)


def _axes_of(value: Any, ranges: Mapping[Any, Any], names: dict[Any, str]) -> dict[int, DynamicAxis]:
    if not isinstance(value, Tensor):
        return {}
    return {i: _dynamic_axis(_symbol(s), ranges, names) for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt)}


def _symbol(size: Any) -> Any:
    """The sympy expression of a symbolic size."""
    return size.node.expr


def _dynamic_axis(symbol: Any, ranges: Mapping[Any, Any], names: dict[Any, str]) -> DynamicAxis:
    if symbol.is_Add and all(part.is_Symbol for part in symbol.args):
        parts = sorted((_dynamic_axis(part, ranges, names) for part in symbol.args), key=lambda part: part.name)
        highs = [part.high for part in parts if part.high is not None]
        return DynamicAxis(PLUS.join(p.name for p in parts), sum(p.low for p in parts), sum(highs) if len(highs) == len(parts) else None)
    if not symbol.is_Symbol:
        raise CaptureError(f"a dynamic axis is bound to the expression {symbol}; only independent dynamic axes and their sums are supported: pass plain Dims")
    bounds = ranges.get(symbol)
    low = max(1, int(bounds.lower)) if bounds is not None else 1
    high = int(bounds.upper) if bounds is not None and bounds.upper < 2**31 else None
    return DynamicAxis(names.get(symbol, str(symbol)), low, high)


def _given_names(placeholders: list[fx.Node], given: Any, kwargs: Mapping[str, Any]) -> dict[Any, str]:
    """Symbol -> name of the user's `Dim`, matched leaf by leaf in order."""
    if given is None:
        return {}
    if isinstance(given, Mapping) and set(given) == set(kwargs):
        given = {k: given[k] for k in kwargs}  # placeholders stand in the order of the call
    specs = pytree.tree_leaves(given, is_leaf=_is_axis_map)
    names: dict[Any, str] = {}
    if len(specs) != len(placeholders):
        return names
    for node, spec in zip(placeholders, specs, strict=True):
        value = node.meta.get("val")
        for axis, dim in _axis_items(spec):
            if isinstance(value, Tensor) and isinstance(value.shape[axis], torch.SymInt) and hasattr(dim, "__name__"):
                names.setdefault(_symbol(value.shape[axis]), dim.__name__)
    return names


def _is_axis_map(x: Any) -> bool:
    """Whether `x` says which axes of one leaf vary: None, `{axis: dim}`, or one entry an axis."""
    if isinstance(x, (tuple, list)):
        return bool(x) and all(isinstance(d, (torch.export.Dim, type(torch.export.Dim.AUTO), type(None))) for d in x)
    return x is None or (isinstance(x, dict) and all(isinstance(k, int) for k in x))


def _axis_items(spec: Any) -> list[tuple[int, Any]]:
    if isinstance(spec, (tuple, list)):
        return list(enumerate(spec))
    return list(spec.items()) if isinstance(spec, dict) else []
