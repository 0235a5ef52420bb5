"""Weights stored as tensor trains of three and more sites: which bonds, and the edit (TT-SVD of the weight alone, CompactifAI, arXiv 2401.14109)."""

from __future__ import annotations

from math import prod

import torch

from ..ir.edit import Editor
from ..ir.formats.tensor_train import TensorTrain
from ..ir.sites import WeightSite
from ..ir.trains import decompose, full_bonds, train_parameters
from .base import SiteResult
from .modes import balanced_modes


def stored_train(site: WeightSite, sites: int, *, chi: int | None = None, ratio: float | None = None) -> TensorTrain | str:
    """Balanced cores of bond `chi`, or of the largest bond that keeps `ratio` (None: that is smaller than the weight); a reason where there are none."""
    outputs, inputs = balanced_modes(site.rows, sites), balanced_modes(site.columns, sites)
    exact = full_bonds(outputs, inputs)
    bond = chi if chi is not None else _largest(outputs, inputs, max(exact), int((ratio or 1.0) * site.parameters))
    count = train_parameters(outputs, inputs, max(bond, 1))
    if bond > max(exact):
        return f"chi={bond} is more than the exact bond {max(exact)}; use a smaller one"
    if bond < 1 or count > site.parameters:
        return f"{sites} cores of bond {max(bond, 1)} hold {count:,} weights, the weight itself {site.parameters:,}"
    return TensorTrain(outputs=outputs, inputs=inputs, bonds=tuple(min(bond, b) for b in exact))


def _largest(outputs: tuple[int, ...], inputs: tuple[int, ...], most: int, room: int) -> int:
    """By bisection: parameters rise with the bond."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if train_parameters(outputs, inputs, middle) <= room else (low, middle)
    return low


def store(editor: Editor, site: WeightSite, planned: TensorTrain, tolerance: float | None) -> SiteResult:
    """Put the cores in; with a `tolerance` (relative error of the weight) of the bonds it allows, as long as they are fewer weights than the weight has."""
    matrix, fmt = site.matrix().float(), planned
    if tolerance is not None:
        fmt = TensorTrain(outputs=planned.outputs, inputs=planned.inputs, bonds=decompose(matrix, planned.outputs, planned.inputs, tolerance=tolerance).bonds)
        count = sum(prod(t.shape) for t in fmt.payload_spec(site.rows, site.columns, site.dtype).values())
        if count > site.parameters:
            why = f"left as it is: cores within tolerance={tolerance} hold {count:,} weights, the weight itself {site.parameters:,}"
            return SiteResult(site=site.name, action=why, bytes_before=site.nbytes, bytes_after=site.nbytes, facts={"kept": 1.0})
    payload = fmt.encode(matrix.to(site.dtype))
    error = float((fmt.decode(payload, site.rows, site.columns, torch.float32) - matrix).norm() / matrix.norm().clamp_min(1e-30))
    facts = {"chi": float(max(fmt.bonds)), "kept": sum(t.numel() for t in payload.values()) / site.parameters, "weight_error": error}
    editor.compress(site, fmt, payload, f"factorize_mpo: {len(fmt.outputs)} cores", facts)
    after = sum(t.nbytes for t in payload.values())
    return SiteResult(site=site.name, action=fmt.to_spec(), bytes_before=site.nbytes, bytes_after=after, facts=facts)
