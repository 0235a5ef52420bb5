"""Which tensors are trained: weights, biases, norms and free parameters, and nothing that training must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import TrainingError
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors
from fxpress.passes.context import Context
from fxpress.passes.pipeline import run_pipeline
from fxpress.passes.quantize_rtn import QuantizeRtn
from fxpress.passes.trainable import find_parts, part_bytes, select, write_back, zero_mask

from ..tiny import randn


def trained(program: Program) -> set[str]:
    return {t for p in find_parts(program)[0] for t in p.tensors}


@pytest.mark.parametrize("name", ["mlp", "conv", "conv1d", "embedding", "llama", "vit"])
def test_every_parameter_and_no_buffer(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    assert trained(program) == {n for n, t in named_tensors(program.graph_module) if isinstance(t, nn.Parameter) and n in read}
    assert not find_parts(program)[1]


def test_parts_are_named_after_sites_and_norms(captured: Callable[[str], Program]) -> None:
    parts = {p.name: p for p in find_parts(captured("conv"))[0]}
    assert list(parts) == ["conv1", "bn1", "conv2", "bn2", "head"]
    assert parts["bn1"].tensors == ("bn1.weight", "bn1.bias") and parts["bn1"].site is None
    assert parts["conv2"].tensors == ("conv2.weight", "conv2.bias") and parts["conv2"].site is not None
    assert part_bytes(captured("conv"), parts["head"]) == 4 * (8 * 5 + 5)
    assert {"model.norm", "model.layers.0.input_layernorm"} <= {p.name for p in find_parts(captured("llama"))[0]}


def test_compressed_sites_and_shared_storage_are_skipped_with_a_reason(captured: Callable[[str], Program]) -> None:
    program = run_pipeline(captured("mlp"), [QuantizeRtn(bits=8, only=("up",))], Context()).program
    parts, skips = find_parts(program)
    assert [p.name for p in parts] == ["down"]
    assert [s.site for s in skips] == ["up"] and "packed weights are not trained" in skips[0].why

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4, bias=False)
            self.register_buffer("top", self.up.weight.detach()[:2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """`[N, 4] -> [N, 4]`."""
            assert isinstance(self.top, torch.Tensor)
            return self.up(x) + self.top.sum()

    parts, skips = find_parts(capture(Shared().eval(), randn(3, 4)))
    assert not parts and "shares storage with top of another shape" in skips[0].why


def test_patterns_choose_parts_or_single_tensors(captured: Callable[[str], Program]) -> None:
    parts = find_parts(captured("conv"))[0]
    assert select(parts, ()) == parts
    assert [p.tensors for p in select(parts, ("bn*", "conv2.bias"))] == [("bn1.weight", "bn1.bias"), ("conv2.bias",), ("bn2.weight", "bn2.bias")]
    with pytest.raises(TrainingError, match="pattern 'nothing' matches no trainable site or tensor; there are conv1"):
        select(parts, ("bn*", "nothing"))


def test_zeros_count_from_five_percent_on() -> None:
    weight = torch.ones(10, 10)
    weight[0, :4] = 0
    assert zero_mask(weight) is None
    weight[0, 4] = 0
    mask = zero_mask(weight)
    assert mask is not None and torch.equal(mask, weight != 0)


def test_write_back_reaches_all_names_and_reports_the_change(captured: Callable[[str], Program]) -> None:
    program = captured("embedding")
    parts = find_parts(program)[0]
    old = {s.name: s.matrix().clone() for s in program.sites()}
    results = write_back(program, parts, {parts[0].tensors[0]: old["embed"] * 1.5}, "test", "why")
    assert [(r.site, r.action) for r in results] == [("embed", "train"), ("mix", "keep"), ("head", "train")]
    assert results[0].facts["relative_change"] == pytest.approx(0.5) and results[1].facts["relative_change"] == 0
    assert [c.before.module for c in program.journal.changes if c.before] == ["embed", "head"]
    assert all(torch.equal(s.matrix(), old["embed"] * 1.5) for s in program.sites() if s.name != "mix")
    program.verify()
