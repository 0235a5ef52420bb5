"""What a code-generation target is, and how targets and their fast paths are found: by file stem, without a table.

A target is the module `codegen/<name>.py` or the package `codegen/<name>_target/` that defines a `Target`. Inside a package, the file
`<format>.py` is the fast path for that weight format; a format without one is decoded to a dense weight, and the report says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from ..ir.errors import LowerError
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.spec import suggest

Artifact = TypeVar("Artifact")
Base = TypeVar("Base")


@dataclass(frozen=True)
class Yes:
    """The target takes the site as it is stored."""


@dataclass(frozen=True)
class No:
    """The target cannot take the site as it is stored; the weight is decoded instead."""

    reason: str


Support = Yes | No


@dataclass(frozen=True, kw_only=True)
class SiteLowering:
    """What one weight site became: the operators used (`form`), why these, and the bytes it stores (tied tensors count at their first site)."""

    site: str
    format: str
    form: str
    why: str
    nbytes: int
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class LoweringReport:
    """What a target made of a program. `nbytes` counts every stored tensor, biases and norms included."""

    target: str
    sites: tuple[SiteLowering, ...]
    nbytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line per form with its sites, bytes and reason; notes last."""
        groups: dict[tuple[str, str, str], list[SiteLowering]] = defaultdict(list)
        for site in self.sites:
            groups[site.format, site.form, site.why].append(site)
        forms = (
            f"{len(members)} x {fmt} -> {form}, {sum(m.nbytes for m in members) / 1e6:.2f} MB ({why}): {_names(members)}"
            for (fmt, form, why), members in groups.items()
        )
        return "\n".join((*forms, *(f"note: {note}" for note in self.notes)))


def _names(members: Sequence[SiteLowering]) -> str:
    return ", ".join(m.site for m in members[:2]) + (", ..." if len(members) > 2 else "")


@dataclass(frozen=True)
class Lowered(Generic[Artifact]):
    """The target's artefact (a program, an ONNX model, ...) and the report on it."""

    artifact: Artifact
    report: LoweringReport


class Target(ABC, Generic[Artifact]):
    """Turns compressed programs into something that runs."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = cls.__module__.removeprefix(f"{__package__}.").partition(".")[0]
        cls.name = own.removesuffix("_target")

    @abstractmethod
    def supports(self, site: WeightSite) -> Support:
        """Whether the site keeps its stored form, or the reason why it is decoded."""

    @abstractmethod
    def lower(self, program: Program) -> Lowered[Artifact]:
        """Lower `program`, which stays as it was."""


def class_in(module: ModuleType, base: type[Base]) -> type[Base] | None:
    """The concrete subclass of `base` that `module` (or a module below it) defines and exposes, or None."""
    classes = (v for v in vars(module).values() if isinstance(v, type) and issubclass(v, base) and v.__module__.startswith(module.__name__))
    return next((c for c in classes if not getattr(c, "__abstractmethods__", None)), None)


def fast_path(package: str, format_name: str, base: type[Base]) -> Base | None:
    """The fast path `<package>/<format_name>.py`, or None when there is no such file."""
    name = f"{package}.{format_name}"
    if importlib.util.find_spec(name) is None:
        return None
    found = class_in(importlib.import_module(name), base)
    return found() if found else None


@cache
def target_names() -> tuple[str, ...]:
    """Names of the targets that this package defines."""
    return tuple(sorted(_classes()))


@cache
def _classes() -> dict[str, type[Target[Any]]]:
    package = importlib.import_module(__package__)
    modules = [importlib.import_module(f".{m.name}", __package__) for m in pkgutil.iter_modules(package.__path__)]
    found = [c for m in modules if (c := class_in(m, Target)) is not None]  # type: ignore[type-abstract]
    return {c.name: c for c in found}


def target_named(name: str, **options: Any) -> Target[Any]:
    """The target called `name`, with the `options` that its class takes (`Triton`: `device`)."""
    if name not in _classes():
        raise LowerError(f"unknown target {name!r}{suggest(name, target_names())}; this fxpress has the targets {', '.join(target_names())}")
    try:
        return _classes()[name](**options)
    except TypeError as error:
        raise LowerError(f"target {name}: {error}") from error
