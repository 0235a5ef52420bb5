"""Values of programs that were read from files, constants among their inputs included."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import fxpress
from fxpress.ir.axes import analyze_axes
from fxpress.ir.capture import capture

from ..tiny import Mlp, randn


class Switched(nn.Module):
    """An `Mlp` behind a flag that capture fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        """`[..., 12] -> [..., 6]`."""
        return self.inner(x) if flag else -self.inner(x)


def test_a_loaded_program_with_a_constant_input_has_shapes_again(tmp_path: Path) -> None:
    program = capture(Switched().eval(), {"x": randn(3, 12), "flag": True})
    fxpress.optimize(program, "prune_magnitude{sparsity=0.5}").save(tmp_path / "artifact")
    loaded = fxpress.load(tmp_path / "artifact").program
    assert [c.size for c in analyze_axes(loaded).classes] == [c.size for c in analyze_axes(program).classes]
    small = fxpress.optimize(loaded, "prune_structured{ratio=0.5,importance=l2}").program
    assert small.parameters < program.parameters
    assert torch.isfinite(small.run_examples()).all()
