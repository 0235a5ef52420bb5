"""A residual net small enough to heal in a test, with inputs that leave data-aware methods something to gain."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.examples import as_examples
from fxpress.passes.pipeline import run_pipeline

from .nets import correlated


class Layer(nn.Module):
    """A residual block: norm, up, gelu, down."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """`[B, T, width]`; `scale: [T, 1]` crosses every cut."""
        return x + scale * self.down(nn.functional.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Three layers between two linears; `repeat` runs the first layer's weights once more, behind the last."""

    def __init__(self, *, repeat: bool = False) -> None:
        super().__init__()
        self.repeat = repeat
        self.enter = nn.Linear(6, 12)
        self.layers = nn.ModuleList(Layer(12, 20) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, 6] -> [B, T, 5]`."""
        scale = 1 + x.abs().mean((0, 2)).unsqueeze(-1)
        x = self.enter(x)
        for layer in [*self.layers, *(self.layers[:1] if self.repeat else [])]:
            x = layer(x, scale)
        out: Tensor = self.head(x)
        return out


@cache
def tower(*, repeat: bool = False) -> Program:
    """The net as a program; shared, so leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Tower(repeat=repeat).eval()
        for name, parameter in net.named_parameters():
            if "up" in name or "down" in name:
                parameter.data.mul_(2.0)
        return capture(net, (batch(0),))


def batch(seed: int) -> Tensor:
    """`[4, 8, 6] float32`."""
    return correlated(32, 6, seed=seed).reshape(4, 8, 6) * 3


def context(program: Program, *, batches: int = 8, **more: object) -> Context:
    """Calibration and training batches, and the program as the original."""
    data = [batch(s) for s in range(1, batches + 1)]
    calls, examples = as_calls(data, program.inputs), as_examples(data, program.inputs)
    return Context(calibration=calls, training=examples, original=program, **more)  # type: ignore[arg-type]


def compressed(program: Program, *specs: str) -> Program:
    """The program after these passes."""
    return run_pipeline(program, [parse_pass(s) for s in specs], context(program)).program
