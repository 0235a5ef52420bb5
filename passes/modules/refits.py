"""The published refit of feed-forward networks: the down-projection of the neurons that stay is the least-squares fit of the old one, on dense inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...ir.edit import Editor
from ..base import Need
from ..calibrate import CalibrationWalk, site_groups
from ..context import Context
from ..modular import nystrom, output_error
from .finding import Module, Part


def refit_by_nystrom(editor: Editor, kept: Mapping[Module, Tensor], ctx: Context) -> dict[str, float]:
    """Set every down-projection that loses neurons, zero where they go; returns relative output errors by site name."""
    dense = editor.program.clone()
    by_site = {m.output.name: (m, k) for m, k in kept.items() if m.part is Part.FEED_FORWARD}
    walk, errors = CalibrationWalk(dense, ctx.calibration), {}
    for sites in ctx.track(site_groups([s for s in dense.sites() if s.name in by_site]), "refitting (nystrom)"):
        gram = walk.statistics(sites, Need.GRAM).gram
        assert gram is not None
        for module, stays in (by_site[s.name] for s in sites):
            old = module.output.matrix().float()
            new = torch.zeros_like(old)
            new[:, stays] = nystrom(gram[0], old, stays)
            errors[module.output.name] = output_error(gram[0], old, new)
            editor.set_matrix(module.output, new.to(module.output.dtype), "down-projection of the kept neurons fitted anew (Nystrom)")
    return errors
