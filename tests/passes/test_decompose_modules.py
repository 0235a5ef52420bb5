"""Modular decomposition end to end on tiny models: budgets met, exact where nothing is lost, every layout, every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.capture import capture
from fxpress.ir.errors import CalibrationError, PassError, SpecError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.passes.context import Context
from fxpress.passes.decompose_modules import DecomposeModules
from fxpress.passes.modules.facts import Neurons, Pairs, Values
from fxpress.passes.pipeline import run_pipeline

from .. import attention_models
from ..checks import relative_error
from ..masking import outputs
from ..tiny import fresh_program, randn, tiny, tokens

PUBLISHED = "neurons=leverage,values=own,pairs=norms,refit=nystrom,allocation=uniform"


def data(name: str, batches: int = 4) -> list[Any]:
    """Calls like the example of `name`, of other values."""
    args, kwargs = tiny(name).call
    if name.startswith("llama") or name in ("gpt2", "opt", "bert"):
        shape = kwargs["input_ids"].shape
        return [{**kwargs, "input_ids": tokens(shape[0], shape[1], seed=i)} for i in range(batches)]
    return [tuple(randn(*a.shape, seed=i) for a in args) if args else {k: randn(*v.shape, seed=i) for k, v in kwargs.items()} for i in range(batches)]


def decompose(name: str, options: str, program: Program | None = None) -> Any:
    return fxpress.optimize(program or fresh_program(name), f"decompose_modules{{{options}}}", calibration=data(name))


def shares(result: Any) -> float:
    """Kept share of the weights of attention and feed-forward projections."""
    names = [s.name for s in fresh_program("llama").sites() if ".layers." in s.name]
    kept, whole = (sum(s.parameters for s in p.sites() if s.name in names) for p in (result.program, fresh_program("llama")))
    return kept / whole


@pytest.mark.parametrize(
    "options", ["ratio=0.7,multiple_of=4,head_multiple=2", pytest.param(f"ratio=0.7,multiple_of=4,head_multiple=2,{PUBLISHED}", marks=pytest.mark.slow)]
)
def test_the_ratio_is_met_and_the_model_exports_saves_and_runs_at_other_sizes(options: str, tmp_path: Path) -> None:
    result = decompose("llama", options)
    assert 0.6 < shares(result) <= 0.7
    parts = {t.action.split(":")[0] for t in result.reports[0].taken}
    assert parts <= {"feed_forward", "query_key", "value_output"} and (len(parts) == 3 or PUBLISHED not in options)
    other = tiny("llama").other
    assert other is not None
    assert torch.isfinite(result.program.run_inputs(other).logits).all()
    result.save(tmp_path / "artifact")
    again = fxpress.load(tmp_path / "artifact")
    assert relative_error(outputs(again.program)[0], outputs(result.program)[0]) < 1e-6
    result.export_onnx(tmp_path / "model.onnx")  # checked against ONNX Runtime: index of the rotary tables, unequal head sizes, scale


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_other_families(name: str) -> None:
    result = decompose(name, "ratio=0.8,multiple_of=4,head_multiple=2")
    assert result.program.parameters < fresh_program(name).parameters
    assert all(bool(torch.isfinite(o).all()) for o in outputs(result.program))


def test_heads_keep_pairs_of_their_own_and_the_original_softmax_scale() -> None:
    result = decompose("llama", "ratio=0.7,parts=[query_key],head_multiple=2,allocation=uniform,min_keep=0.25")
    attention = next(n for n in result.program.graph.nodes if "scaled_dot" in str(n.target))
    assert attention.kwargs["scale"] == pytest.approx(8**-0.5)
    index = get_tensor(result.program.graph_module, "model.layers.0.self_attn.k_proj.rotary_index")
    kept = index.shape[1] // 2
    assert bool((index[:, kept:] == index[:, :kept] + 4).all())  # both channels of every pair


def test_what_the_loss_feels_beats_what_was_published_on_its_own_data() -> None:
    dense = outputs(fresh_program("llama"))[0]
    errors = {o: relative_error(outputs(decompose("llama", f"ratio=0.6,multiple_of=4,head_multiple=2,{o}").program)[0], dense) for o in ("", PUBLISHED)}
    assert errors[""] < errors[PUBLISHED]


def test_channels_that_do_nothing_go_for_free() -> None:
    """Values of half the rank and neurons that are zero: at the size that is left the model computes what it did."""
    program = attention_models.program("one_key_head")
    with torch.no_grad():
        for site in program.sites():
            if site.name.endswith((".wv", ".wk")):
                get_tensor(program.graph_module, site.tensors[0])[[2, 3, 6, 7]] = 0
                if site.bias:
                    get_tensor(program.graph_module, site.bias)[[2, 3, 6, 7]] = 0
            if site.name.startswith("networks") and site.rows == 40:
                get_tensor(program.graph_module, site.tensors[0])[20:] = 0
                get_tensor(program.graph_module, site.bias or "")[20:] = -1.0
    batches = [(randn(2, 5, 6, seed=i).double(),) for i in range(20)]
    result = fxpress.optimize(program, "decompose_modules{ratio=0.78,multiple_of=4,head_multiple=2}", calibration=batches)
    assert relative_error(result.program.run(*batches[0]), program.run(*batches[0])) < 1e-4


def test_plans_are_pure_and_planning_once_is_enough() -> None:
    program, spec = fresh_program("llama"), DecomposeModules(ratio=0.7, multiple_of=4, head_multiple=2)
    ctx = Context(calibration=[((), c) for c in data("llama")])
    before = program.to_text()
    plan = spec.analyze(program, ctx)
    assert program.to_text() == before
    result = run_pipeline(program, [spec], ctx)
    assert program.to_text() == before
    assert [(d.site, d.facts["kept"]) for d in plan.decisions] == [(t.site, t.facts["kept"]) for t in result.reports[0].taken]
    preview = program.clone()
    spec.preview(preview, plan, ctx)
    assert [s.shape for s in preview.sites()] == [s.shape for s in result.program.sites()]


def test_a_killed_run_reads_its_facts_again(tmp_path: Path) -> None:
    first = fxpress.optimize(fresh_program("llama"), "decompose_modules{ratio=0.8}", calibration=data("llama"), checkpoint_dir=tmp_path)
    second = fxpress.optimize(fresh_program("llama"), "decompose_modules{ratio=0.8}", calibration=data("llama"), checkpoint_dir=tmp_path)
    assert any("modules-" in p.name for p in tmp_path.iterdir())
    assert torch.equal(outputs(first.program)[0], outputs(second.program)[0])


def test_entropic_allocation_spares_layers_that_change_their_stream() -> None:
    result = decompose("llama", "ratio=0.7,multiple_of=1,head_multiple=1,allocation=entropic,temperature=0.05")
    kept = {i: sum(t.facts["kept"] / t.facts["size"] for t in result.reports[0].taken if f"layers.{i}." in t.site) for i in (0, 1)}
    assert kept[0] != kept[1]


def test_later_passes_treat_what_is_left() -> None:
    result = fxpress.optimize(
        fresh_program("llama"), ["decompose_modules{ratio=0.8}", "quantize_rtn{bits=8,group_size=8,skip=[lm_head]}"], calibration=data("llama")
    )
    assert sum(s.compressed for s in result.program.sites()) >= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neurons": Neurons.LEVERAGE}, "units of the loss"),
        ({"values": Values.OWN}, "units of the loss"),
        ({"pairs": Pairs.NORMS}, "units of the loss"),
    ],
)
def test_scores_that_do_not_compare_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DecomposeModules(ratio=0.5, **options)


def test_refusals_say_what_to_do() -> None:
    program = fresh_program("llama")
    with pytest.raises(CalibrationError, match="calibration data"):
        fxpress.optimize(program, "decompose_modules{ratio=0.8}")
    with pytest.raises(PassError, match=r"cannot reach 5\.0%"):
        fxpress.optimize(program, "decompose_modules{ratio=0.05}", calibration=data("llama"))
    linear = capture(nn.Linear(4, 4).eval(), (randn(2, 4),))
    with pytest.raises(PassError, match="no feed-forward network and no attention"):
        fxpress.optimize(linear, "decompose_modules{ratio=0.8}", calibration=[(randn(2, 4),)])
    quantized = fxpress.optimize(program, "quantize_rtn{bits=8,group_size=8}").program
    with pytest.raises(PassError, match="prune before quantizing"):
        fxpress.optimize(quantized, "decompose_modules{ratio=0.8}", calibration=data("llama"))


def test_normalised_queries_are_left_alone_with_the_reason() -> None:
    program = attention_models.program("qk_norm")
    batches = [(randn(2, 5, 6, seed=i).double(),) for i in range(4)]
    result = fxpress.optimize(program, "decompose_modules{ratio=0.8,multiple_of=1,head_multiple=1}", calibration=batches)
    assert any("normalises" in s.why for s in result.reports[0].skipped)
