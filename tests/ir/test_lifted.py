"""Programs as exported ones without tracing: the same graph, results, tensors and names."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree

import fxpress
from fxpress.ir.lifted import lifted
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors

from ..runtime.test_causal_lm import captured
from ..tiny import fresh_program, tiny


def same(program: Program, inputs: tuple[tuple[object, ...], dict[str, object]]) -> None:
    exported = lifted(program)
    for a, b in zip(
        pytree.tree_leaves(exported.module(check_guards=False)(*inputs[0], **inputs[1])), pytree.tree_leaves(program.run_inputs(inputs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "unet", "embedding", "llama", "vit"])
def test_results_are_the_program_s_at_other_sizes_too(name: str) -> None:
    program = fresh_program(name)
    same(program, (program.inputs.args, program.inputs.kwargs))
    if tiny(name).other is not None:
        same(program, tiny(name).other)  # type: ignore[arg-type]


def test_compressed_sites_and_caches() -> None:
    program = fxpress.optimize(captured("llama"), "quantize_rtn{bits=4,group_size=8}").program
    same(program, program.inputs.sized({"new": 2, "past": 5, "batch": 3}))


def test_tensors_are_shared_and_the_program_stays() -> None:
    program = fresh_program("conv")
    before = program.to_text()
    exported = lifted(program)
    assert program.to_text() == before
    pointers = {n: t.data_ptr() for n, t in named_tensors(program.graph_module)}
    assert {n: t.data_ptr() for n, t in exported.state_dict.items()} == {n: pointers[n] for n in exported.state_dict}
    assert set(exported.graph_signature.parameters) | set(exported.graph_signature.buffers) == set(exported.state_dict)


def test_ranges_of_dynamic_axes_come_along() -> None:
    exported = lifted(fresh_program("mlp"))
    assert exported.range_constraints
