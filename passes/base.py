"""What a pass is: analyze -> plan -> rewrite -> report, with every refusal given a reason and a place."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, Flag, auto
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..ir.edit import Editor
from ..ir.errors import SpecError
from ..ir.formats.base import WeightFormat
from ..ir.program import Program
from ..ir.sites import SiteKind, WeightSite
from ..ir.spec import Options, parse_spec, suggest

if TYPE_CHECKING:
    from .calibrate import Statistics
    from .context import Context


class Guarantee(Enum):
    """What a pass promises about the outputs, weakest last."""

    EXACT = "exact"  # equal up to float rounding
    BOUNDED = "bounded"  # the weight error is bounded by a stated formula
    CALIBRATED = "calibrated"  # chosen from data; no bound
    TRAINED = "trained"


class Need(Flag):
    """Input statistics a pass wants at each site it takes."""

    NONE = 0
    MEAN = auto()  # [K]
    MEAN_SQUARE = auto()  # [K]
    MEAN_ABS = auto()  # [K]
    ABS_MAX = auto()  # [K]
    GRAM = auto()  # [K, K]
    GUIDED = auto()  # [P, K, K] a site: the Gram of rows weighted by squared output gradients
    FISHER = auto()  # [N, K] a site: squared gradients of the weight
    INPUTS = auto()  # the site's data itself, as the walk holds it


@dataclass(frozen=True)
class Guidance:
    """Guided Grams: `groups` parts of the output channels (in each conv group) get one each; squared output gradients count by their `power`."""

    groups: int = 1
    power: float = 1.0


@dataclass(frozen=True)
class Skip:
    """A site left out, and why."""

    site: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a plan will do at one site. `facts` are numbers worth printing."""

    site: str
    action: str
    bytes_before: int
    bytes_after: int
    flops: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Pure data: what a pass decided before it touched anything."""

    pass_spec: str
    decisions: tuple[Decision, ...]
    skips: tuple[Skip, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def carried_out(self) -> tuple[SiteResult, ...]:
        """The decisions as results, of a pass that does just what it decided."""
        return tuple(
            SiteResult(site=d.site, action=d.action, bytes_before=d.bytes_before, bytes_after=d.bytes_after, facts=dict(d.facts)) for d in self.decisions
        )


@dataclass(frozen=True, kw_only=True)
class SiteResult:
    """What was done at one site, with measured numbers (`relative_error`, `sparsity`, `bits_per_weight`, ...)."""

    site: str
    action: str
    bytes_before: int
    bytes_after: int
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """What a pass did: sites taken, sites skipped and why, size and time."""

    pass_spec: str
    guarantee: Guarantee
    taken: tuple[SiteResult, ...]
    skipped: tuple[Skip, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...] = ()
    history: tuple[tuple[int, float], ...] = ()  # passes that train end to end: steps done, held-out loss

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"guarantee": self.guarantee.value}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PassReport:
        """Inverse of `to_dict`."""
        return PassReport(
            **dict(data)
            | {
                "guarantee": Guarantee(data["guarantee"]),
                "taken": tuple(SiteResult(**t) for t in data["taken"]),
                "skipped": tuple(Skip(**s) for s in data["skipped"]),
                "notes": tuple(data["notes"]),
                "history": tuple((step, loss) for step, loss in data.get("history", ())),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Pass(Options, ABC):
    """Base of all passes. `only` and `skip` are site-name patterns: shell globs, or regular expressions after `re:`."""

    guarantee: ClassVar[Guarantee]
    uses_data: ClassVar[bool] = False  # whether some options need calibration or training data
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    allow_empty: bool = False

    @abstractmethod
    def analyze(self, program: Program, ctx: Context) -> Plan:
        """Decide what to do at each site, without touching anything."""

    @abstractmethod
    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Carry the plan out through an `Editor`."""

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Make `program`, a throw-away clone, look as it will after this pass, cheaply: later passes plan on it."""
        self.rewrite(program, plan, ctx)

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Sentences for the report about the pass as a whole."""
        return ()

    def why_unnamed(self, name: str) -> str | None:
        """Reason why `only` or `skip` leaves the site called `name` out, or None."""
        if self.only and not any(matches(name, p) for p in self.only):
            return f"not in only={list(self.only)}"
        hit = next((p for p in self.skip if matches(name, p)), None)
        return f"matched skip pattern {hit!r}" if hit else None


@dataclass(frozen=True, kw_only=True)
class SitePass(Pass):
    """A pass that treats weight sites one by one, perhaps with statistics of their inputs.

    Consecutive site passes with `needs` share one calibration walk (see `stage`).
    """

    makes_sites: ClassVar[bool] = False  # whether its sites become other sites, which a later pass must plan and observe anew

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Kinds of sites the pass takes."""
        return frozenset(SiteKind)

    @property
    def needs(self) -> Need:
        """Input statistics `rewrite_site` wants."""
        return Need.NONE

    @property
    def guidance(self) -> Guidance:
        """What the guided Grams are made of."""
        return Guidance()

    @property
    def sees_edits(self) -> bool:
        """Whether statistics come from the model as compressed so far (sequential), or from the model as it entered the pass."""
        return True

    @abstractmethod
    def why_not(self, site: WeightSite) -> str | None:
        """Reason why the pass cannot take this site, or None."""

    @abstractmethod
    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """What will be done at a site the pass can take."""

    @abstractmethod
    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Treat one site as decided; `statistics` hold what `needs` asked for."""

    def analyze(self, program: Program, ctx: Context) -> Plan:
        """Split the sites into decisions and skips."""
        decisions, skips = [], []
        for site in program.sites():
            why = self.why_skip(site)
            if why is None:
                decisions.append(self.decide(site, ctx))
            else:
                skips.append(Skip(site.name, why))
        return Plan(pass_spec=self.to_spec(), decisions=tuple(decisions), skips=tuple(skips))

    def why_skip(self, site: WeightSite) -> str | None:
        """Why the pass leaves this site alone: not named, of another kind, or one that it cannot take."""
        if (unnamed := self.why_unnamed(site.name)) is not None:
            return unnamed
        if site.kind not in self.site_kinds:
            return f"{self.name} takes {', '.join(sorted(k.value for k in self.site_kinds))}; this is a site of kind {site.kind.value}"
        return self.why_not(site)

    def planned_format(self, site: WeightSite) -> WeightFormat | None:
        """Format the site will hold after the pass; None when it stays as it is stored."""
        return None

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Swap in the planned formats with tensors that have shapes but no data."""
        chosen = {d.site for d in plan.decisions}
        with Editor(program, self.to_spec()) as editor:
            for site in [s for s in program.sites() if s.name in chosen]:
                fmt = self.planned_format(site)
                if fmt is not None:
                    spec = fmt.payload_spec(site.rows, site.columns, site.dtype)
                    hold = editor.recompress if site.compressed else editor.compress
                    hold(site, fmt, {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in spec.items()}, "preview")

    def rewrite(self, program: Program, plan: Plan, ctx: Context) -> tuple[SiteResult, ...]:
        """Treat every decided site in graph order, under one calibration walk when the pass has `needs`."""
        from .stage import run_stage

        return run_stage(program, (self,), (plan,), ctx).results[0]


def matches(name: str, pattern: str) -> bool:
    """Whether a site name matches a glob, or a regular expression after `re:`."""
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise SpecError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern)


@cache
def pass_names() -> tuple[str, ...]:
    """Names of the passes: the modules of this package that define one."""
    package = importlib.import_module(__package__)
    names = [m.name for m in pkgutil.iter_modules(package.__path__)]
    return tuple(sorted(n for n in names if _class_in(n) is not None))


def _class_in(name: str) -> type[Pass] | None:
    module = importlib.import_module(f".{name}", __package__)
    own = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Pass) and c.__module__ == module.__name__)
    return next((c for c in own if not getattr(c, "__abstractmethods__", None)), None)


def pass_class(name: str) -> type[Pass]:
    """The pass class defined in `passes/<name>.py`."""
    found = _class_in(name) if name in pass_names() else None
    if found is None:
        raise SpecError(f"unknown pass {name!r}{suggest(name, pass_names())}; passes are {', '.join(pass_names())}")
    return found


def parse_pass(item: Pass | str | Mapping[str, Any]) -> Pass:
    """A pass from an object, a text spec, or a recipe entry (`{name: {option: value}}`, or `{name: null}`)."""
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        name, options = parse_spec(item)
        return pass_class(name).from_dict(options)
    if isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        return pass_class(str(name)).from_dict(options or {})
    raise SpecError(f"pass {item!r}: expected a pass object, a spec such as 'quantize_rtn{{bits=4}}', or {{name: {{option: value}}}}")
