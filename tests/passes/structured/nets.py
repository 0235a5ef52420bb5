"""Programs with groups, and the pieces the tests of structured pruning share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.program import Program
from fxpress.ir.structure import Role, find_structure
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.prune_structured import DEFAULT_ROLES
from fxpress.passes.structured.groups import Group, find_groups

from ...tiny import Mlp, fresh_program, randn, tiny


@cache
def _mlp() -> Program:
    torch.manual_seed(0)
    return capture(Mlp(12, 20, 6).eval(), (randn(64, 12),))


def mlp() -> tuple[Program, Context]:
    """An MLP with 20 hidden units; inputs of uneven size."""
    program = _mlp().clone()
    batches = [randn(64, 12, seed=s) * torch.linspace(0.1, 2, 12) for s in range(2)]
    return program, Context(calibration=as_calls([(b,) for b in batches], program.inputs))


def tiny_with_data(name: str) -> tuple[Program, Context]:
    """A program of the tiny zoo, calibrated on its example inputs."""
    program = fresh_program(name)
    args, kwargs = tiny(name).call
    return program, Context(calibration=as_calls([kwargs or args], program.inputs))


def groups_of(program: Program, *roles: Role) -> list[Group]:
    """The groups of some roles (default: those the pass takes)."""
    return find_groups(program, find_structure(program), roles or DEFAULT_ROLES)


def hidden_inputs(program: Program, ctx: Context) -> Tensor:
    """What the MLP's second linear sees on the calibration data, in double precision."""
    up = next(s for s in program.sites() if s.name == "up")
    bias = dict(program.graph_module.named_parameters())["up.bias"].double()
    rows = torch.cat([call[0][0] for call in ctx.calibration]).double()
    return torch.relu(rows @ up.matrix().double().t() + bias)


class Redundant(nn.Module):
    """A hidden layer whose last four units are mixtures of the first four: removing them costs nothing once the others make up for it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            mixture = torch.randn(4, 4, generator=generator)
            self.up.weight[4:], self.up.bias[4:] = mixture @ self.up.weight[:4], mixture @ self.up.bias[:4]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 6] -> [B, 3]`, linear throughout but for a gain."""
        return self.down(self.up(x) * 2.0)


def redundant() -> tuple[Program, Context]:
    """The redundant net, with data."""
    torch.manual_seed(0)
    program = capture(Redundant().eval(), (randn(32, 6),))
    return program, Context(calibration=as_calls([(randn(32, 6, seed=1),)], program.inputs))


Builder = Callable[[], tuple[Program, Context]]
