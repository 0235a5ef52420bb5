"""Store the zeros that pruning left as what they are: one bit a weight, or less, instead of a value.

Lossless: every weight decodes to what it was before. Dense, affine and learned-table weights are taken; of the last two the codes of zeros are dropped, so
pruned and quantized weights take bits for what is left only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.errors import PassError, SpecError
from ..ir.formats.balanced import Balanced
from ..ir.formats.base import parse_format
from ..ir.formats.bitmap import Bitmap
from ..ir.formats.nm import Nm
from ..ir.formats.sparse import INNER, Sparse, largest_of_groups
from ..ir.program import Program
from ..ir.site_calls import why_not_compressible
from ..ir.sites import SiteKind, WeightSite
from ..ir.spec import option
from .base import Decision, Guarantee, SitePass, SiteResult
from .calibrate import Statistics
from .context import Context
from .pruning import PLANNED_ZEROS

WORD = 32  # columns of a balanced group unless `group` says otherwise
PREFERENCE = {Nm.name: 1.0, Balanced.name: 1.0, Bitmap.name: 1.1}  # bytes count so much when forms are compared


class SparseFormat(Enum):
    """The stored form."""

    AUTO = "auto"  # the one with the fewest bytes; nm and balanced, which kernels read faster, also at up to 10 % more
    BITMAP = "bitmap"
    BALANCED = "balanced"
    NM = "nm"


@dataclass(frozen=True, kw_only=True)
class StoreSparse(SitePass):
    """Re-store weights `[N, K]` that hold exact zeros. `keep` of `group` columns: for `balanced` (default: the fewest of 32 that hold all) and `nm` (2:4)."""

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    format: SparseFormat = SparseFormat.AUTO
    keep: int | None = option(None, ge=1)
    group: int | None = option(None, ge=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format in (SparseFormat.AUTO, SparseFormat.BITMAP) and (self.keep or self.group):
            raise SpecError(
                f"store_sparse: keep and group go with format=balanced or nm, for example store_sparse{{format=balanced,keep=16}}; got {self.to_spec()}"
            )

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Everything but embeddings, whose rows are looked up one by one."""
        return frozenset(SiteKind) - {SiteKind.EMBEDDING}

    def why_not(self, site: WeightSite) -> str | None:
        """Formats that are no inner format, weights without zeros, forms that do not hold the weight or do not make it smaller."""
        if not isinstance(site.format, INNER):
            return f"holds {site.format.to_spec()}; only dense, affine and lut weights are taken"
        if not site.compressed and (reason := why_not_compressible(site)) is not None:
            return reason
        if _unknown(site):
            return None
        matrix = site.matrix()
        if not bool((matrix == 0).any()):
            return "has no zeros; prune it first"
        fitting = self._fitting(site, matrix)
        if not fitting:
            return self._why_unfit(matrix)
        best = fitting[0].nbytes(site.rows, site.columns, site.dtype)
        return f"would take {best:,} bytes sparse, {site.nbytes:,} as it is" if best >= site.nbytes else None

    def decide(self, site: WeightSite, ctx: Context) -> Decision:
        """The form and its exact bytes; a dry run cannot know the zeros of weights that earlier passes would make."""
        fmt = self.planned_format(site)
        if fmt is None:
            return Decision(site=site.name, action="store the zeros as such (the size depends on them)", bytes_before=site.nbytes, bytes_after=site.nbytes)
        after = fmt.nbytes(site.rows, site.columns, site.dtype)
        return Decision(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, flops=20.0 * site.parameters)

    def planned_format(self, site: WeightSite) -> Sparse | None:
        """The form that the site will take, if its zeros are known."""
        return None if _unknown(site) else self._fitting(site, site.matrix())[0]

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Drop the entries of zeros, and check that nothing else changed."""
        matrix, fmt = site.matrix(), parse_format(decision.action)
        assert isinstance(fmt, Sparse)
        payload = fmt.pack(fmt.choose(matrix), site.payload())
        if not torch.equal(fmt.decode(payload, site.rows, site.columns, site.dtype), matrix):
            raise PassError(f"store_sparse at {site}: the weight in {fmt.to_spec()} does not decode to what it was; please report this")
        facts = {"sparsity": float((matrix == 0).float().mean()), "bits_per_weight": fmt.bits_per_weight(site.rows, site.columns, site.dtype)}
        facts |= {"untied": 1.0} if site.tied else {}
        hold = editor.recompress if site.compressed else editor.compress
        hold(site, fmt, payload, "zeros stored as such", facts)
        after = sum(t.nbytes for t in payload.values())
        return SiteResult(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, facts=facts)

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Which sites stopped sharing a weight."""
        untied = [r.site for r in results if "untied" in r.facts]
        return (f"{', '.join(untied)}: no longer shares its weight; a tied site that is not stored sparse keeps the old one",) if untied else ()

    def _fitting(self, site: WeightSite, matrix: Tensor) -> list[Sparse]:
        """Forms that hold the weight exactly, the best first."""
        fitting = [f for f in self._candidates(site, matrix) if f.why_illegal(site.rows, site.columns) is None and _holds(f, matrix)]
        return sorted(fitting, key=lambda f: f.nbytes(site.rows, site.columns, site.dtype) * PREFERENCE[f.name])

    def _candidates(self, site: WeightSite, matrix: Tensor) -> list[Sparse]:
        values, found = site.format.to_spec(), list[Sparse]()
        if self.format in (SparseFormat.AUTO, SparseFormat.NM):
            found.append(Nm(keep=self.keep or 2, group=self.group or 4, values=values))
        if self.format in (SparseFormat.AUTO, SparseFormat.BALANCED):
            group = self.group or WORD
            keep = self.keep or max(1, _most(matrix, group))
            found += [Balanced(keep=keep, group=group, values=values)] if keep < group else []
        if self.format in (SparseFormat.AUTO, SparseFormat.BITMAP):
            found.append(Bitmap(count=int((matrix != 0).sum()), values=values))
        return found

    def _why_unfit(self, matrix: Tensor) -> str:
        group = self.group or (4 if self.format is SparseFormat.NM else WORD)
        demanded = f"{self.keep or (2 if self.format is SparseFormat.NM else group - 1)} of {group}"
        return f"{self.format.value} does not hold it: {demanded} columns are kept, and a group has {_most(matrix, group)} that are not zero"


def _unknown(site: WeightSite) -> bool:
    """Whether earlier passes of the plan decide which weights are zero."""
    return PLANNED_ZEROS in site.node.meta or any(t.is_meta for t in site.payload().values())


def _most(matrix: Tensor, group: int) -> int:
    """Most nonzeros in any group of columns."""
    present = torch.nn.functional.pad((matrix != 0).int(), (0, -matrix.shape[1] % group))
    return int(present.unflatten(1, (-1, group)).sum(-1).max())


def _holds(fmt: Sparse, matrix: Tensor) -> bool:
    """Whether no nonzero is left out."""
    if isinstance(fmt, Bitmap):
        return True
    assert isinstance(fmt, (Balanced, Nm))
    return not bool((matrix != 0)[~largest_of_groups(matrix.abs(), fmt.keep, fmt.group)].any())
