"""What the unstructured pruning passes share: legality at a site, and the edit itself."""

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
from .base import Decision, Guarantee, SitePass, SiteResult
from .calibrate import Statistics
from .context import Context
from .masks import parse_pattern


@dataclass(frozen=True, kw_only=True)
class Pruning(SitePass):
    """Sets weights to exactly zero. `sparsity` is the fraction removed; `pattern` `"N:M"` keeps N of every M consecutive inputs instead.

    Embeddings are left alone; a weight tied to one is skipped unless `untie`, which gives the site its own copy first.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.CALIBRATED
    sparsity: float | None = option(None, ge=0.0, lt=1.0)
    pattern: str | None = None
    untie: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sparsity is None) == (self.pattern is None):
            raise SpecError(f"{self.name}: give exactly one of sparsity and pattern, for example {self.name}{{sparsity=0.5}} or {self.name}{{pattern=2:4}}")
        if self.pattern is not None:
            parse_pattern(self.pattern)

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

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """Dense storage keeps its size; a sparse format is what saves bytes."""
        action = f"remove {self.pattern}" if self.pattern else f"remove {100 * self.fraction:g} %"
        return Decision(site=site.name, action=action, bytes_before=site.nbytes, bytes_after=site.nbytes, flops=40.0 * site.parameters)

    @abstractmethod
    def mask(self, site: WeightSite, matrix: Tensor, decision: Decision, statistics: Statistics | None) -> Tensor:
        """`[N, K] bool`, True where `matrix` is removed."""

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Zero the masked weights."""
        if site.tied:
            site = editor.untie(site)
        matrix = site.matrix()
        mask = self.mask(site, matrix, decision, statistics)
        pruned = matrix.masked_fill(mask, 0.0)
        facts = {
            "sparsity": float((pruned == 0).float().mean()),
            "relative_error": float((matrix - pruned).norm() / matrix.norm().clamp_min(1e-30)),
        }
        editor.set_matrix(site, pruned, decision.action, facts)
        return SiteResult(site=site.name, action=decision.action, bytes_before=site.nbytes, bytes_after=site.nbytes, facts=facts)

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Say that zeros stored densely save nothing yet."""
        return ("zeros are stored densely: bytes are unchanged until a sparse format holds them",)
