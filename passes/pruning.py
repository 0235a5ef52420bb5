"""What the passes that zero single weights share: the options sparsity and pattern, legality at a site, and the edit itself."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ir.edit import Editor
from ..ir.errors import SpecError
from ..ir.program import Program
from ..ir.sites import SiteKind, WeightSite
from ..ir.spec import option
from .base import Decision, Guarantee, Plan, SitePass, SiteResult
from .calibrate import Statistics
from .context import Context
from .masks import parse_pattern

UNSTRUCTURED = "unstructured"  # the pattern of weights removed wherever they are

PLANNED_ZEROS = "fxpress_planned_zeros"  # key in a node's meta: an earlier pass of the plan will leave zeros in its weight


@dataclass(frozen=True, kw_only=True)
class Pruning(SitePass):
    """Sets weights to exactly zero. `sparsity` is the fraction removed; `pattern` `"N:M"` keeps N of every M consecutive inputs of a row instead.

    `pattern=unstructured` is the default and needs `sparsity`. With N:M, `sparsity` may be left out; given, it has to agree. Both are stored in their
    shortest form, so `{sparsity=0.5,pattern=2:4}` equals `{pattern=2:4}`. Embeddings are left alone; a weight tied to one is skipped unless `untie`, which
    gives the site its own copy first.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    sparsity: float | None = option(None, ge=0.0, lt=1.0)
    pattern: str | None = None
    untie: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == UNSTRUCTURED:
            object.__setattr__(self, "pattern", None)
        if self.pattern is not None:
            self._check_agreement(self.pattern)
        elif self.sparsity is None:
            raise SpecError(f"{self.name}: give a sparsity or an N:M pattern, for example {self.name}{{sparsity=0.5}} or {self.name}{{pattern=2:4}}")

    def _check_agreement(self, pattern: str) -> None:
        keep, group = parse_pattern(pattern)
        if self.sparsity is not None and abs(self.sparsity - (1 - keep / group)) > 1e-3:
            raise SpecError(
                f"{self.name}: sparsity={self.sparsity:g} and pattern={pattern} contradict each other: {pattern} removes {1 - keep / group:g}; leave one out,"
                f" or write pattern={UNSTRUCTURED}"
            )
        object.__setattr__(self, "sparsity", None)

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Everything but embeddings."""
        return frozenset(SiteKind) - {SiteKind.EMBEDDING}

    @property
    def fraction(self) -> float:
        """Fraction of weights removed."""
        if self.pattern is None:
            return self.sparsity or 0.0
        keep, group = parse_pattern(self.pattern)
        return 1 - keep / group

    def why_not(self, site: WeightSite) -> str | None:
        """Compressed sites, tied sites without `untie`, and N:M patterns that do not divide the columns are skipped."""
        if site.compressed:
            return f"already holds {site.format.to_spec()}; prune before quantizing"
        if site.tied and not self.untie:
            return f"its weight is tied to {', '.join(site.tied)}, which would be pruned with it; set untie=true to prune a copy of its own"
        if self.pattern and site.columns % parse_pattern(self.pattern)[1]:
            return f"pattern {self.pattern} does not divide its {site.columns} columns"
        return None

    def flops(self, site: WeightSite) -> float:
        """Work at a site, for the estimate."""
        return 40.0 * site.parameters

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """Dense storage keeps its size; a sparse format is what saves bytes."""
        action = f"remove {self.pattern}" if self.pattern else f"remove {100 * self.fraction:g} %"
        return Decision(site=site.name, action=action, bytes_before=site.nbytes, bytes_after=site.nbytes, flops=self.flops(site))

    @abstractmethod
    def prune(self, site: WeightSite, matrix: Tensor, decision: Decision, statistics: Statistics | None) -> tuple[Tensor, dict[str, float]]:
        """The pruned `matrix: [N, K]` in its own dtype, and facts worth reporting."""

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Prune, and measure what that did to the weights."""
        if site.tied:
            site = editor.untie(site)
        matrix = site.matrix()
        pruned, more = self.prune(site, matrix, decision, statistics)
        facts = {
            "sparsity": float((pruned == 0).float().mean()),
            "relative_error": float((matrix - pruned).norm() / matrix.norm().clamp_min(1e-30)),
        } | more
        editor.set_matrix(site, pruned, decision.action, facts)
        return SiteResult(site=site.name, action=decision.action, bytes_before=site.nbytes, bytes_after=site.nbytes, facts=facts)

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """Say at the sites that they will have zeros; which ones is not known yet."""
        chosen = {d.site for d in plan.decisions}
        for site in program.sites():
            if site.name in chosen:
                site.node.meta[PLANNED_ZEROS] = True

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Say that zeros stored densely save nothing yet."""
        return ("zeros are stored densely: bytes are unchanged until store_sparse follows",)


@dataclass(frozen=True, kw_only=True)
class MaskPruning(Pruning):
    """Pruning that only chooses what goes: the weights that stay keep their values."""

    @abstractmethod
    def mask(self, site: WeightSite, matrix: Tensor, decision: Decision, statistics: Statistics | None) -> Tensor:
        """`[N, K] bool`, True where `matrix` is removed."""

    def prune(self, site: WeightSite, matrix: Tensor, decision: Decision, statistics: Statistics | None) -> tuple[Tensor, dict[str, float]]:
        """Zero the masked weights."""
        return matrix.masked_fill(self.mask(site, matrix, decision, statistics), 0.0), {}
