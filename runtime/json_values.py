"""FX arguments and plain records as JSON values, and back. Tags are one-key objects such as `{"dtype": "float32"}`; nothing is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..ir.errors import ArtifactError

DAMAGED = "the file is damaged, save the program again"


def _named(kind: type) -> dict[str, Any]:
    """The constants of `torch` of one type, such as every dtype, by name."""
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}


_CONSTANTS: dict[str, tuple[type, dict[str, Any]]] = {
    kind.__name__: (kind, _named(kind)) for kind in (torch.dtype, torch.layout, torch.memory_format)
}  # fmt: skip


def encode(value: Any, where: str) -> Any:
    """JSON form of an FX argument.

    Taken: nodes, None, bools, ints, floats (infinities and NaN too), complex numbers, strings, dtypes, devices, layouts, memory formats, slices, lists,
    tuples, dicts. Anything else raises `ArtifactError` that names `where`.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    for tag, (kind, _) in _CONSTANTS.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    return _encode_composite(value, where)


def _encode_composite(value: Any, where: str) -> Any:
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, where), encode(value.imag, where)]}
    if isinstance(value, slice):
        return {"slice": [encode(v, where) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, list):
        return [encode(v, where) for v in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(v, where) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, where), encode(v, where)] for k, v in value.items()]}
    raise ArtifactError(f"{where}: cannot save a {type(value).__name__} ({str(value)[:80]}); expected numbers, text, dtypes, nodes and lists of them")


def decode(data: Any, nodes: Mapping[str, fx.Node], where: str) -> Any:
    """Inverse of `encode`; `{"node": name}` is looked up in `nodes`. Malformed data raises `ArtifactError`."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(v, nodes, where) for v in data]
    if isinstance(data, dict) and len(data) == 1:
        tag, inner = next(iter(data.items()))
        try:
            return _decode_tagged(tag, inner, nodes, where)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{where}: cannot read {str(data)[:80]}: {type(error).__name__}: {error}; {DAMAGED}") from error
    raise ArtifactError(f"{where}: expected a JSON value with one tag, got {str(data)[:80]}; {DAMAGED}")


def _decode_tagged(tag: str, inner: Any, nodes: Mapping[str, fx.Node], where: str) -> Any:
    if tag in _CONSTANTS:
        return _CONSTANTS[tag][1][inner]
    decoders: dict[str, Callable[[], Any]] = {
        "node": lambda: nodes[inner],
        "float": lambda: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner],
        "device": lambda: torch.device(inner),
        "complex": lambda: complex(*(decode(v, {}, where) for v in inner)),
        "slice": lambda: slice(*(decode(v, nodes, where) for v in inner)),
        "tuple": lambda: tuple(decode(v, nodes, where) for v in inner),
        "dict": lambda: {decode(k, {}, where): decode(v, nodes, where) for k, v in inner},
    }
    return decoders[tag]()


def plain_json(value: Any) -> Any:
    """A report or record (nested dicts with text keys, lists, tuples, scalars) as strict JSON: tuples become lists, infinities and NaN become tags."""
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    return encode(value, "record")


def plain_value(data: Any) -> Any:
    """Inverse of `plain_json`, up to tuples."""
    if isinstance(data, dict) and set(data) == {"float"} and isinstance(data["float"], str):
        return decode(data, {}, "record")
    if isinstance(data, dict):
        return {k: plain_value(v) for k, v in data.items()}
    return [plain_value(v) for v in data] if isinstance(data, list) else data
