"""Small modules that hold a compressed weight and stand where a linear, conv or embedding stood.

They keep the attributes other code reads (`in_features`, `embedding_dim`, ...), hold the payload as buffers `weight_<part>`, and call the fxpress operators.
`weight` is still there: its dtype, device and shape cost nothing, and any operator that uses it gets the decoded values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from typing_extensions import Self

from ..ir.errors import LowerError
from ..ir.ops import decode_weight
from ..ir.sites import SiteKind, WeightSite


class LazyWeight(Tensor):
    """Stands for a weight that is decoded when an operator first needs its values."""

    _decode: Callable[[], Tensor]

    @classmethod
    def of(cls, decode: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Self:
        """A stand-in for what `decode()` returns."""
        lazy = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        lazy._decode = decode
        return lazy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(LazyWeight, lambda lazy: lazy._decode(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


class CompressedWeight(nn.Module):
    """Base of the modules below: a payload in a weight format. `weight_shape` is the shape the fxpress operator takes."""

    weight_format: str
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    transposed: bool
    parts: tuple[str, ...]

    def hold(self, site: WeightSite, *, transposed: bool, leaf: str = "weight") -> None:
        """Take the payload of a compressed `site`; `transposed`: the user's module stores `[K, N]`."""
        payload = {f"{leaf}_{part}": tensor for part, tensor in site.payload().items()}
        self.take(payload, site.format.to_spec(), tuple(site.shape), site.dtype, transposed=transposed)

    def take(self, payload: Mapping[str, Tensor], weight_format: str, shape: tuple[int, ...], dtype: torch.dtype, *, transposed: bool) -> None:
        """Take a payload by the names of its buffers."""
        self.weight_format, self.weight_shape, self.weight_dtype, self.transposed = weight_format, shape, dtype, transposed
        self.parts = tuple(payload)
        for name, tensor in payload.items():
            self.register_buffer(name, tensor)

    @property
    def payload(self) -> list[Tensor]:
        """The stored tensors in format order."""
        return [self._buffers[name] for name in self.parts]  # type: ignore[misc]

    def decoded(self) -> Tensor:
        """The dense weight as the user's module stored it."""
        weight = decode_weight(self.payload, self.weight_format, self.weight_shape, self.weight_dtype)
        return weight.t() if self.transposed else weight

    @property
    def weight(self) -> Tensor:
        """The weight, decoded when its values are used."""
        shape = self.weight_shape[::-1] if self.transposed else self.weight_shape
        return LazyWeight.of(self.decoded, shape, self.weight_dtype, self.payload[0].device)

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"{list(self.weight_shape)}, {self.weight_format}"


class CompressedLinear(CompressedWeight):
    """`x: [..., K] -> [..., N]`; takes the place of `nn.Linear` and of the transformers `Conv1D`."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the decoded weight."""
        return torch.ops.fxpress.linear(x, self.payload, self.bias, self.weight_format, self.weight_shape)


class CompressedConv(CompressedWeight):
    """`x: [B, I, *space]`, 1-d or 2-d, zero padding; takes the place of `nn.Conv1d` and `nn.Conv2d`."""

    bias: Tensor | None
    geometry: tuple[list[int], list[int], list[int], int]

    def hold(self, site: WeightSite, *, transposed: bool = False, leaf: str = "weight") -> None:
        """Take the payload, and stride, padding, dilation and groups of the site's node."""
        super().hold(site, transposed=transposed, leaf=leaf)
        stride, padding, dilation, groups = site.node.args[5:9]
        self.geometry = (list(stride), list(padding), list(dilation), int(groups))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the decoded weight."""
        return torch.ops.fxpress.conv(x, self.payload, self.bias, self.weight_format, self.weight_shape, *self.geometry)


class CompressedEmbedding(CompressedWeight):
    """`ids: [...] integer -> [..., D]`; takes the place of `nn.Embedding`."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows of the decoded table up."""
        return torch.ops.fxpress.embedding(ids, self.payload, self.weight_format, self.weight_shape, self.weight_dtype)


_PLAIN_TYPES: dict[tuple[type[nn.Module], SiteKind], type[CompressedWeight]] = {
    (nn.Linear, SiteKind.LINEAR): CompressedLinear, (nn.Embedding, SiteKind.EMBEDDING): CompressedEmbedding,
    (nn.Conv1d, SiteKind.CONV1D): CompressedConv, (nn.Conv2d, SiteKind.CONV2D): CompressedConv,
}  # fmt: skip
_KEPT = ("in_features", "out_features", "nf", "nx", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
         "num_embeddings", "embedding_dim", "padding_idx")  # fmt: skip


def compressed_copy(module: nn.Module, leaf: str, site: WeightSite, bias: Tensor | None, *, transposed: bool) -> nn.Module:
    """A module that does what `module` does, with its weight called `leaf` as the compressed `site` holds it; `transposed`: it stored `[K, N]`.

    Plain linears, convs and embeddings get one of the classes above. Anything else keeps its own class and forward, and finds the decoded weight under `leaf`.
    """
    plain = _plain_type(module, site.kind)
    if plain is None or leaf != "weight":
        return _decoding(module, leaf, site, bias, transposed)
    fresh = stand_in(plain, module, bias)
    fresh.hold(site, transposed=transposed)
    write_sizes(fresh, tuple(site.shape))
    return fresh


def stand_in(kind: type[CompressedWeight], module: nn.Module, bias: Tensor | None) -> CompressedWeight:
    """One of the classes above with what other code reads of `module`, and no weight yet."""
    fresh = kind()
    for name in _KEPT:
        if hasattr(module, name):
            setattr(fresh, name, getattr(module, name))
    if kind is not CompressedEmbedding:
        fresh.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return fresh


def write_sizes(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Let the sizes a linear, conv or embedding states agree with its weight's `shape`: passes may have removed channels."""
    for names in (("out_features", "in_features"), ("nf", "nx"), ("num_embeddings", "embedding_dim")):
        for name, size in zip(names, shape, strict=False):
            if hasattr(module, name):
                setattr(module, name, size)
    if hasattr(module, "out_channels"):
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups  # type: ignore[assignment, operator]


def _plain_type(module: nn.Module, kind: SiteKind) -> type[CompressedWeight] | None:
    """The class that computes what the module does, or None when it does something of its own."""
    if getattr(module, "padding_mode", "zeros") != "zeros" or module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.") and kind is SiteKind.LINEAR:
        return CompressedLinear
    return _PLAIN_TYPES.get((type(module), kind))


def _decoding(module: nn.Module, leaf: str, site: WeightSite, bias: Tensor | None, transposed: bool) -> nn.Module:
    """Change `module` into a subclass of its class whose attribute `leaf` is the decoded weight."""
    if leaf not in module._parameters or (bias is not None and "bias" not in module._parameters):
        raise LowerError(f"attach: site {site.name}: {type(module).__name__} does not hold {leaf} and bias as its parameters; use result.module() instead")
    if bias is not None:
        module.register_parameter("bias", nn.Parameter(bias.detach(), requires_grad=False))
    as_decoding(module, leaf)
    CompressedWeight.hold(module, site, transposed=transposed, leaf=leaf)  # type: ignore[arg-type]
    return module


def as_decoding(module: nn.Module, leaf: str) -> None:
    """Make the module's class one whose parameter `leaf` is decoded from a payload that it has yet to take."""
    del module._parameters[leaf]
    body = {leaf: property(CompressedWeight.decoded), "__module__": __name__}  # its own forward needs the values at once
    module.__class__ = type(f"Compressed{type(module).__name__}", (CompressedWeight, type(module)), body)
