"""Programs with structure that one kind of factorization suits, and their data."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache

import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.program import Program
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.cp import Canonical
from fxpress.passes.kronecker_sum import Cores

from ...tiny import Mlp, randn


def program_of(model: nn.Module, *shape: int, batches: int = 4) -> tuple[Program, Context]:
    """The model captured for inputs of this shape, calibrated on independent normal ones."""
    program = capture(model.eval(), (randn(*shape),))
    return program, Context(calibration=as_calls([(randn(*shape, seed=s + 1),) for s in range(batches)], program.inputs))


def _filled(module: nn.Module, weight: Tensor) -> nn.Module:
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight)
    return module


@cache
def structured_linears() -> tuple[Program, Context]:
    """`0`: five Kronecker products, `2`: a product of rank 6, `4`: neither; with activations between."""
    torch.manual_seed(0)
    kronecker = Cores(first=randn(16, 2, 5), second=randn(5, 2, 16, seed=1), rows=32, columns=32).matrix() / 10
    low = randn(32, 6, seed=2) @ randn(6, 32, seed=3) / 10
    net = nn.Sequential(_filled(nn.Linear(32, 32), kronecker), nn.Tanh(), _filled(nn.Linear(32, 32), low), nn.Tanh(), nn.Linear(32, 32))
    return program_of(net, 64, 32)


@cache
def structured_convolutions() -> tuple[Program, Context]:
    """`0`: a kernel of four one-way terms, `2`: one of 5 input and 6 output channels, `4`: a 1x1 kernel of rank 3, `6`: a linear."""
    torch.manual_seed(0)
    terms = Canonical(factors=tuple(randn(n, 4, seed=i) for i, n in enumerate((24, 16, 3, 3)))).tensor()
    core = torch.einsum("oiab,fo,ci->fcab", randn(6, 5, 3, 3), randn(24, 6, seed=1), randn(24, 5, seed=2))
    pointwise = (randn(16, 3) @ randn(3, 24, seed=1)).view(16, 24, 1, 1)
    net = nn.Sequential(
        _filled(nn.Conv2d(16, 24, 3, padding=1), terms / 8),
        nn.Tanh(),
        _filled(nn.Conv2d(24, 24, 3, padding=1), core / 40),
        nn.Tanh(),
        _filled(nn.Conv2d(24, 16, 1), pointwise / 6),
        nn.Tanh(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    return program_of(net, 2, 16, 10, 10)


def feed_forward(low_rank: bool) -> tuple[Program, Context]:
    """An MLP whose weights have rank 4 (a slice would hurt), or whose hidden units are eight, each three times (a pair would hurt)."""
    torch.manual_seed(0)
    net = Mlp(24, 24, 24)
    with torch.no_grad():
        if low_rank:
            net.up.weight.copy_(randn(24, 4) @ randn(4, 24, seed=1) / 4)
            net.down.weight.copy_(randn(24, 4, seed=2) @ randn(4, 24, seed=3) / 4)
        else:
            net.up.weight.copy_(randn(8, 24).repeat(3, 1) / 2)
            net.up.bias.copy_(randn(8, seed=1).repeat(3))
    return program_of(net, 128, 24)


@cache
def two_layers() -> tuple[Program, Context]:
    """`enter`, a linear with a falling spectrum, and an MLP whose second linear has no bias."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(enter=nn.Linear(16, 24), act=nn.Tanh(), mlp=Mlp(24, 20, 12)))
    with torch.no_grad():
        weight = net.get_parameter("enter.weight")
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((left * values * torch.logspace(0, -2, 16)) @ right)
    return program_of(net, 96, 16)
