"""What every site costs at every width: bytes as stored, and the rise of the loss to second order when its weights are rounded.

The rise is `1/2 sum_n (q_n - w_n) H (q_n - w_n)^T` under the guided Gram H, which makes layers comparable (Kim et al., "GuidedQuant", arXiv 2505.07004,
equation 6). Weights are rounded simply here (clustered for `lut`, least squares ranges for `affine`): a quantizer that compensates errors lowers
all widths alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.errors import PassError
from ..ir.formats.affine import Affine
from ..ir.formats.base import WeightFormat, parse_format
from ..ir.formats.composite import Composite
from ..ir.formats.lut import Lut
from ..ir.program import Program
from ..ir.sites import WeightSite
from .base import Need
from .calibrate import CalibrationWalk, site_groups
from .context import Context
from .lut.fit import Problem, fit_tables
from .memory import Tensors, remembered
from .quantizing import Quantization
from .ranges import RangeSearch, find_range
from .sensitivities import guided_positions, row_weights


def rounded(matrix: Tensor, fmt: WeightFormat, weights: Tensor) -> Tensor:
    """`matrix: [N, K] f32` as `fmt` holds it when errors are weighted by `weights: [N, K]`, without compensation between weights."""
    base = parse_format(fmt.parts[0]) if isinstance(fmt, Composite) else fmt
    nothing = torch.zeros(matrix.shape, dtype=torch.bool)
    if isinstance(base, Lut):
        fit = fit_tables(Problem(matrix=matrix, weights=weights, kept=nothing, pruned=nothing, fmt=base, parts=(len(matrix),)))
        return fit.values.gather(1, fit.codes.long())
    if isinstance(base, Affine):
        scale, zero = find_range(base, matrix, RangeSearch.MSE, weights)
        return base.dequantize(base.quantize(matrix, scale, zero), scale, zero)
    raise PassError(f"allocate_bits cannot estimate errors of the format {fmt.to_spec()}; use quantize_lut, quantize_gptq or quantize_rtn as quantizer=")


def bit_curves(program: Program, sites: Sequence[WeightSite], quantizer: Quantization, widths: Sequence[int], ctx: Context) -> tuple[Tensors, Tensors]:
    """Per site the rise of the loss at every width, `[widths] f32`, and the diagonals `[P, K]` of its guided Grams; one walk, remembered."""
    names = [s.name for s in sites]

    def compute() -> Tensors:
        positions = guided_positions(program, sites, ctx)
        walk = CalibrationWalk(program, ctx.calibration)
        out: Tensors = {}
        for group in ctx.track(site_groups(sites), "cost curves"):
            tokens = walk.statistics(group, Need.NONE).tokens
            for site in group:
                gram = walk.guided(site, positions.get(site.name, torch.zeros(site.groups, tokens)))
                out[f"curve {site.name}"] = _curve(site, quantizer, widths, gram)
                out[f"diagonal {site.name}"] = gram.diagonal(dim1=1, dim2=2).clone()
        return out

    found = remembered(ctx, f"curves {quantizer.to_spec()} {list(widths)}", names, program, compute)
    return {n: found[f"curve {n}"] for n in names}, {n: found[f"diagonal {n}"] for n in names}


def _curve(site: WeightSite, quantizer: Quantization, widths: Sequence[int], gram: Tensor) -> Tensor:
    matrix, weights = site.matrix().float(), row_weights(site, gram.diagonal(dim1=1, dim2=2))
    rises = []
    for bits in widths:
        delta = rounded(matrix, quantizer.format_of(site, bits), weights) - matrix
        parts = zip(delta.tensor_split(len(gram)), gram, strict=True)
        rises.append(sum(0.5 * float(((d @ g) * d).sum()) for d, g in parts))
    return torch.tensor(rises)
