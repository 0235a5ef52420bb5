"""What a nested model loses at given widths: measured on the whole model, with the units behind every prefix masked; no graph is rewritten for it.

The loss is the distance of the outputs from the full model's on the same batches (of a language model the divergence of its predictions), never below zero
and zero at full width. A task's own loss moves by more than a layer's cut when little is cut, and below its start on the few batches there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ir.nodes import get_tensor
from ...ir.program import Program
from ..context import Context
from ..examples import Example
from ..losses import Criterion, Objective, find_language
from ..memory import remembered
from ..structured.groups import Group
from ..tapped import Tapped
from ..training import Teacher

KEPT = 512  # MiB of the full model's outputs that are kept


class WidthLoss:
    """The loss as a function of widths, over the first `batches` calibration batches."""

    def __init__(self, program: Program, groups: Sequence[Group], ctx: Context, batches: int) -> None:
        self._program, self._ctx = program, ctx
        self._examples = [Example(call) for call in ctx.calibration[:batches]]
        self._criterion = Criterion(objective=Objective.DISTILL, language=find_language(program))
        self._run = Tapped(program)
        self._full = Teacher(program, (), KEPT)
        self._owners = {g: {c.site.tensors[0]: (c, c.columns(g.axis)) for c in g.consumers} for g in groups}

    def __call__(self, widths: Mapping[Group, int]) -> float:
        """Mean loss with so many units of each group; groups left out are whole."""
        masked = self._masked(widths)
        total = 0.0
        with torch.no_grad():
            for example in self._examples:
                leaves = self._program.inputs.flatten(*example.call)
                total += float(self._criterion(example, leaves, self._run(example.call, masked), self._full(example)))
        return total / max(1, len(self._examples))

    def _masked(self, widths: Mapping[Group, int]) -> dict[str, Tensor]:
        """Weights of the consumers with the columns of the missing units zero: of centred inputs exactly what a slice computes."""
        found: dict[str, Tensor] = {}
        for group, width in widths.items():
            for name, (consumer, owner) in self._owners[group].items() if width < group.size else ():
                matrix = consumer.site.to_matrix(found.get(name, get_tensor(self._program.graph_module, name).detach()))
                found[name] = consumer.site.from_matrix(matrix * (owner < width).to(matrix.dtype))
        return found


def single_losses(loss: WidthLoss, program: Program, groups: Sequence[Group], shares: Sequence[float], ctx: Context, batches: int) -> dict[Group, list[float]]:
    """The loss of cutting one group alone to each of the `shares`; made once a run and group, and once over runs that share a checkpoint folder."""
    found = {}
    for group in ctx.track(groups, "measuring widths"):
        widths = [max(1, round(share * group.size)) for share in shares]

        def compute(group: Group = group, widths: Sequence[int] = widths) -> dict[str, Tensor]:
            return {"losses": torch.tensor([loss({group: w}) for w in widths], dtype=torch.float64)}

        found[group] = remembered(ctx, f"width-{batches}-{widths}", [group.name], program, compute)["losses"].tolist()
    return found


def curve(shares: Sequence[float], losses: Sequence[float], at: float) -> float:
    """The loss of cutting to the share `at`, from those measured at falling `shares`: none at full width, powers of what is cut between and beyond points.

    Losses that fall as more is cut are noise, and lifted to the ones before.
    """
    cuts, heights, highest = [], [], 0.0
    for share, value in zip(shares, losses, strict=True):
        highest = max(highest, value, 1e-12)
        cuts.append(1 - share)
        heights.append(highest)
    cut = 1 - at
    if cut <= 0:
        return 0.0
    if cut <= cuts[0] or len(cuts) == 1:
        return float(heights[0] * (cut / cuts[0]) ** 2)
    place = next((i for i in range(1, len(cuts)) if cut <= cuts[i]), len(cuts) - 1)
    low, high = torch.tensor([cuts[place - 1], heights[place - 1]]).log(), torch.tensor([cuts[place], heights[place]]).log()
    power = float((high[1] - low[1]) / (high[0] - low[0]))
    return float(heights[place - 1] * (cut / cuts[place - 1]) ** power)
