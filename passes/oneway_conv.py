"""One-way convolutions: kernels become products of one filter along the channels and one along each axis, before training (a priori) or fitted to trained ones.

Source: flattened networks (Jin et al., arXiv 1412.5474); "A priori compression of convolutional neural networks for wave simulators" (Boukraichi et al., arXiv
2304.04964), of which only the abstract could be read: what is built here is a reconstruction. See `ir.oneway` for the two forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b

import torch
from torch import Tensor

from ..ir.chain import Chain, parameters
from ..ir.edit import Editor
from ..ir.oneway import chain_of, compose, filter_shapes, find_oneways, kernel_axes
from ..ir.program import Program
from ..ir.site_calls import conv_geometry
from ..ir.sites import CONVOLUTIONS, SiteKind, WeightSite
from ..ir.spec import option
from .base import Decision, Guarantee, Plan, SiteResult
from .calibrate import Statistics
from .context import Context
from .factorizing import Factorization, empty
from .oneway_fit import drawn, fitted

CANCELLING = 1.5  # terms together, over the kernel's size


class Form(Enum):
    """How a one-way convolution runs; `oneway_form` changes it."""

    FACTORED = "factored"  # filter by filter: less arithmetic
    COMPOSED = "composed"  # one convolution with the kernel multiplied out: for training


class Start(Enum):
    """Where the filters come from."""

    FIT = "fit"  # the best terms of the kernel as it is
    FRESH = "fresh"  # drawn anew, for training from the start


@dataclass(frozen=True, kw_only=True)
class OnewayConv(Factorization):
    """`weight: [F, C, *k]` becomes, for each output map, `terms` products of a filter over C channels and one along each axis of the kernel.

    `start=fresh` draws the filters with the variance a product needs, for networks that are trained afterwards; `start=fit` takes the best terms of the
    kernel. `form`: `factored` runs them one after another, `composed` multiplies the kernel out in the graph, which trains better.
    """

    guarantee = Guarantee.CALIBRATED
    terms: int = option(1, ge=1)
    form: Form = Form.FACTORED
    start: Start = Start.FIT

    @property
    def site_kinds(self) -> frozenset[SiteKind]:
        """Convolutions."""
        return frozenset(CONVOLUTIONS)

    def why_not(self, site: WeightSite) -> str | None:
        """Kernels with a single axis, besides what every factorization leaves."""
        axes = len(kernel_axes(site.shape)) + (site.shape[1] > 1)
        if not kernel_axes(site.shape):
            return "a kernel of one position has no axis to filter along"
        return "it has one axis only: it is a one-way filter already" if axes < 2 else super().why_not(site)

    def planned_chain(self, site: WeightSite) -> Chain | str:
        """The filters without data."""
        planned = chain_of({n: empty(*s) for n, s in filter_shapes(site.shape, self.terms).items()}, conv_geometry(site), site.groups)
        if parameters(planned) >= site.parameters:
            return f"{self.terms} terms a map hold {parameters(planned):,} weights, the kernel itself {site.parameters:,}"
        return planned

    def chain(self, site: WeightSite, matrix: Tensor, statistics: Statistics | None, seed: int = 0) -> tuple[Chain | str, dict[str, float]]:
        """The filters, and of fitted ones the relative error and how far terms cancel (`terms`, over the kernel's size: above 1 in part)."""
        generator = torch.Generator(device="cpu").manual_seed(_seed(site, seed))
        if self.start is Start.FRESH:
            filters, facts = drawn(site.shape, self.terms, generator), {"terms_a_map": float(self.terms)}
        else:
            filters, error, cancelling = fitted(matrix.view(site.shape), self.terms, generator)
            facts = {"weight_error": error, "terms": cancelling}
        return chain_of({n: f.to(matrix.device) for n, f in filters.items()}, conv_geometry(site), site.groups), facts

    def rewrite_site(self, editor: Editor, site: WeightSite, decision: Decision, statistics: Statistics | None, ctx: Context) -> SiteResult:
        """Factor, and compose where that form is wanted."""
        result = super().rewrite_site(editor, site, decision, statistics, ctx)
        self._compose(editor, {site.name})
        return result

    def preview(self, program: Program, plan: Plan, ctx: Context) -> None:
        """The same without data."""
        super().preview(program, plan, ctx)
        with Editor(program, self.to_spec()) as editor:
            self._compose(editor, {d.site for d in plan.decisions})

    def notes(self, program: Program, results: tuple[SiteResult, ...]) -> tuple[str, ...]:
        """Says so where terms cancel: training and rounding suffer."""
        wild = [r for r in results if r.facts.get("terms", 0.0) > CANCELLING]
        if not wild:
            return super().notes(program, results)
        worst = max(wild, key=lambda r: r.facts["terms"])
        why = f"in {len(wild)} kernels terms cancel (worst: {worst.site}, {worst.facts['terms']:.1f} times the kernel's size)"
        return (*super().notes(program, results), f"{why}, which training and few bits suffer from; another number of terms may fit better")

    def _compose(self, editor: Editor, names: set[str]) -> None:
        if self.form is Form.COMPOSED:
            for one in [o for o in find_oneways(editor.program) if o.name in names and not o.composed]:
                compose(editor, one, "kernel multiplied out for training")


def _seed(site: WeightSite, seed: int) -> int:
    """A seed of the site's own, the same in every run with the same seed."""
    return int.from_bytes(blake2b(f"{seed}:{site.name}".encode(), digest_size=7).digest(), "big")
