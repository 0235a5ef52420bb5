"""Options as frozen dataclasses: validated when built, and written as text specs `name{a=1,b=[x,y]}` in both directions.

Passes and weight formats derive from `Options`. The spec name is the stem of the file that defines the class.
Field metadata may carry `ge`, `gt`, `le`, `lt` bounds (see `option`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any, ClassVar

from typing_extensions import Self

from .errors import SpecError

_BARE = re.compile(r"[\w.*?/:#+-]+")  # strings that need no quotes
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (lambda v, b: v >= b, ">="), "gt": (lambda v, b: v > b, ">"),
    "le": (lambda v, b: v <= b, "<="), "lt": (lambda v, b: v < b, "<"),
}  # fmt: skip


def option(default: Any = MISSING, *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None) -> Any:
    """A dataclass field with bounds, checked when the object is built."""
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    return field(default=default, metadata=bounds)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of everything that has a text spec. Values are coerced and checked against the annotations on construction."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__module__.rpartition(".")[2]

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]  # mypy takes a class for its instance here
        for f in fields(self):
            value = _coerce(getattr(self, f.name), hints[f.name], f"{self.name}: option {f.name}")
            _check_bounds(value, f.metadata, f"{self.name}: option {f.name}")
            object.__setattr__(self, f.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Every option as plain data (enums as their values, tuples as lists)."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def to_spec(self) -> str:
        """Text spec that names only the options that differ from their defaults."""
        changed = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]
        inside = ",".join(f"{f.name}={_write(_plain(getattr(self, f.name)))}" for f in changed)
        return f"{self.name}{{{inside}}}" if inside else self.name

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Build from plain data; unknown and missing options are refused by name."""
        known = {f.name: f for f in fields(cls)}
        for key in options:
            if key not in known:
                raise SpecError(f"{cls.name}: unknown option {key!r}{suggest(key, known)}; options are {', '.join(sorted(known)) or 'none'}")
        missing = [k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING and k not in options]
        if missing:
            raise SpecError(f"{cls.name}: missing option {missing[0]!r}, for example {cls.name}{{{missing[0]}=...}}")
        return cls(**options)


def suggest(word: str, known: typing.Iterable[str]) -> str:
    """` (did you mean 'x'?)` when something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Split `name{a=1,b=[x,y],c='s'}` into the name and plain option values. Bare words are strings; a quote inside quotes is doubled."""
    name, brace, rest = text.strip().partition("{")
    if brace and not rest.rstrip().endswith("}"):
        raise SpecError(f"spec {text!r}: missing closing brace; write name{{option=value,...}}")
    options: dict[str, Any] = {}
    for part in _split(rest.rstrip()[:-1] if brace else "", text):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise SpecError(f"spec {text!r}: expected option=value, got {part.strip()!r}")
        if key.strip() in options:
            raise SpecError(f"spec {text!r}: option {key.strip()!r} is given twice")
        options[key.strip()] = _read(value.strip(), text)
    if not name.strip().isidentifier():
        raise SpecError(f"spec {text!r}: {name.strip()!r} is not a name; write name{{option=value,...}}")
    return name.strip(), options


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return value.to_spec() if isinstance(value, Options) else dataclasses.asdict(value)
    return value


def _split(text: str, whole: str) -> list[str]:
    """Split on commas that stand outside quotes and brackets."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if quote or depth:
        raise SpecError(f"spec {whole!r}: unbalanced quote or bracket")
    return [p for p in [*parts, text[start:]] if p.strip()]


def _read(text: str, whole: str) -> Any:
    if text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1:
        return text[1:-1].replace(text[0] * 2, text[0])  # a quote inside quotes is doubled
    if text[:1] == "[" and text[-1:] == "]":
        return [_read(p.strip(), whole) for p in _split(text[1:-1], whole)]
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _write(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_write(v) for v in value) + "]"
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and _read(value, value) == value
        return value if bare else "'" + value.replace("'", "''") + "'"
    return {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else repr(value)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or a SpecError that says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce_union(value, [a for a in args if a is not type(None)], where)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (tuple, list)):
            raise SpecError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(v, args[0], where) for v in items)
    return _coerce_scalar(value, hint, where)


def _coerce_union(value: Any, choices: list[Any], where: str) -> Any:
    for choice in choices:
        try:
            return _coerce(value, choice, where)
        except SpecError:
            if choice is choices[-1]:
                raise
    raise AssertionError("a union has at least one choice")


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, hint):
            return value
        known = [m.value for m in hint]
        if value in known:
            return hint(value)
        raise SpecError(f"{where}: expected one of {known}, got {value!r}{suggest(str(value), map(str, known))}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise SpecError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _check_bounds(value: Any, bounds: Mapping[str, Any], where: str) -> None:
    for key, bound in bounds.items():
        test, sign = _BOUNDS[key]
        if value is not None and not test(value, bound):
            raise SpecError(f"{where}={value}: must be {sign} {bound}")
