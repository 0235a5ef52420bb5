"""One model at many widths: equal to slices, not a byte copied, widths of the call, threads, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fxpress
from fxpress.ir.errors import EditError, PassError
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors
from fxpress.runtime.elastic import Elastic

from ..masking import difference, outputs
from ..passes.nesting.nets import nested
from ..passes.test_nest import ARCHITECTURES
from ..tiny import fresh_program


def shared_bytes(full: Program, small: Program) -> tuple[int, int]:
    """Bytes of `small` that lie in the memory of `full`, and all of its bytes."""
    held = {t.untyped_storage().data_ptr() for _, t in named_tensors(full.graph_module)}
    tensors = list(dict(named_tensors(small.graph_module)).values())
    return sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() in held), sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("width", [0.5, 16])
def test_a_view_is_a_slice_and_copies_nothing(name: str, width: float) -> None:
    program, _ = nested(name)
    elastic = Elastic(program)
    small = elastic.at(width)
    shared, held = shared_bytes(program, small)
    assert shared == held < program.nbytes, "prefixes of the full model's own memory"
    spec = f"ratio={width}" if isinstance(width, float) else f"widths=[{width}]"
    assert difference(outputs(small), outputs(fxpress.optimize(program, f"slice{{{spec}}}").program)) < 1e-5
    assert difference(outputs(elastic.at(1.0)), outputs(program)) == 0


def test_key_value_groups_are_views_too() -> None:
    program, _ = nested("llama")
    small = Elastic(program).at(1.0, heads=0.5)
    assert shared_bytes(program, small)[0] == shared_bytes(program, small)[1] < program.nbytes
    with pytest.raises(EditError, match="is no prefix, so it would have to be copied; use the pass slice"):
        Elastic(nested("gpt2")[0]).at(1.0, heads=0.5)


def test_a_width_belongs_to_the_call() -> None:
    program, ctx = nested("llama")
    elastic = Elastic(program)
    kwargs = dict(ctx.calibration[0][1])
    alone = {w: elastic(**kwargs, width=w).logits for w in (1.0, 0.5, 0.25)}
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda w: (w, elastic(**kwargs, width=w).logits), [1.0, 0.5, 0.25] * 4))
    assert all(torch.equal(found, alone[w]) for w, found in together)
    assert elastic.at([24, 64]) is elastic.at((24, 64)) and elastic.at(0.5) is elastic.at(0.5)
    assert list(elastic.widths().values()) == [88, 88]
    assert (
        len({t.data_ptr() for _, t in named_tensors(elastic.at([24, 64]).graph_module)} - {t.data_ptr() for _, t in named_tensors(program.graph_module)}) == 0
    )


def test_refusals() -> None:
    with pytest.raises(PassError, match="in no order of importance; run the pass nest first"):
        Elastic(fresh_program("llama"))
    elastic = Elastic(nested("llama")[0])
    with pytest.raises(PassError, match="width 96 is more than the 88 units"):
        elastic.at(96)
    with pytest.raises(PassError, match="got 3"):
        elastic.at([8, 8, 8])
