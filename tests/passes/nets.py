"""Small networks the pass tests share."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.program import Program
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context


class ConvNet(nn.Module):
    """conv + bn, depthwise, two linears; the first linear's 40 outputs are no multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.hidden = nn.Linear(16 * 16, 40)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.depthwise(x)).flatten(1)
        out: Tensor = self.head(torch.relu(self.hidden(x)))
        return out


class TiedNet(nn.Module):
    """Embedding, two mixing linears and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(x)))
        out: Tensor = self.head(x)
        return out


@cache
def conv_net() -> tuple[Program, Context]:
    """The conv net as a program, with calibration data drawn from correlated inputs."""
    torch.manual_seed(0)
    net = ConvNet().eval()
    assert isinstance(net.norm.running_var, Tensor) and isinstance(net.norm.running_mean, Tensor)
    net.norm.running_var.uniform_(0.5, 2.0)
    net.norm.running_mean.normal_()
    program = capture(net, (correlated(8, 3, 4, 4),))
    return program, Context(calibration=as_calls([correlated(8, 3, 4, 4, seed=s) for s in range(8)], program.inputs))


@cache
def tied_net() -> tuple[Program, Context]:
    """The tied net as a program with random calibration ids."""
    torch.manual_seed(0)
    program = capture(TiedNet().eval(), (torch.randint(0, 50, (4, 12)),))
    return program, Context(calibration=as_calls([torch.randint(0, 50, (4, 12)) for _ in range(8)], program.inputs))


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Inputs whose columns are correlated and of very different size, so that data-aware methods have something to gain."""
    generator = torch.Generator().manual_seed(seed)
    columns = math.prod(shape[1:])
    flat = torch.randn(shape[0], columns, generator=generator)
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(99)) * torch.logspace(-1.5, 0.5, columns)
    return (flat @ mix / columns**0.5).reshape(shape)


def output_error(program: Program, other: Program, ctx: Context) -> float:
    """Relative error of the outputs over the calibration calls, float64 norms."""
    error = power = 0.0
    for call in ctx.calibration:
        a, b = program.run_inputs(call).double(), other.run_inputs(call).double()
        error, power = error + float((a - b).square().sum()), power + float(a.square().sum())
    return (error / power) ** 0.5
