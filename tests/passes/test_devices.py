"""Programs on a GPU: every pass works there, on calibration batches from the CPU, and does what it does on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import fxpress
from fxpress.ir.capture import capture
from fxpress.ir.errors import CaptureError
from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass, pass_names
from fxpress.passes.devices import waiting_for, working_on
from fxpress.runtime.language import logits_of, perplexity

from ..checks import relative_error
from ..masking import outputs
from ..tiny import fresh_program, randn, tiny, tokens

RECIPES = (
    ("llama", "quantize_rtn{bits=4,group_size=8}"), ("llama", "quantize_gptq{bits=4,group_size=8}"), ("mlp", "quantize_lut{bits=3}"),
    ("llama", "quantize_lut{bits=3,outliers=0.01}"), ("llama", "quantize_lut{bits=3,refine=off,sensitivity=uniform}"), ("conv", "quantize_gptq{bits=4}"),
    ("llama", "prune_magnitude{sparsity=0.5}"), ("llama", "prune_wanda{sparsity=0.5}"), ("llama", "prune_sparsegpt{sparsity=0.5}"),
    ("llama", "prune_magnitude{sparsity=0.5}; store_sparse"), ("llama", "prune_structured{ratio=0.3}"), ("conv", "prune_structured{ratio=0.3}"),
    ("llama", "prune_structured{ratio=0.3,importance=taylor}"), ("llama", "drop_blocks{count=1}"), ("conv", "fold_affine"), ("conv", "recalibrate_norms"),
    ("llama", "migrate_scales"), ("llama", "allocate_bits{budget=4bits}"), ("llama", "factorize_svd{ratio=0.7}"), ("llama", "factorize_mpo{ratio=0.7}"),
    ("llama", "factorize_mpo{ratio=0.7,family=2,metric=weight}"), ("conv", "factorize_tucker{ratio=0.6}"), ("conv", "factorize_cp{ratio=0.6}"),
    ("llama", "nest; slice{ratio=0.5,heads=0.5}"), ("llama", "nest; search_widths{budget=0.85,levels=11}"), ("llama", "nest; train_nested{steps=3}"),
    ("llama", "decompose_modules{ratio=0.7,multiple_of=4,head_multiple=2}"), ("vit", "decompose_modules{ratio=0.7,multiple_of=4,head_multiple=2}"),
    ("conv", "oneway_conv{start=fresh,form=composed}; oneway_form{to=factored}"), ("conv", "oneway_conv"),
    ("cached", "quantize_cache"), ("llama", "plan_factorization{budget=0.8}"), ("conv", "plan_factorization{budget=0.8}"),
    ("llama", "factorize_svd{ratio=0.6}; recover{steps=3}"), ("llama", "factorize_svd{ratio=0.6}; recover{scope=block,steps=3}"),
    ("llama", "factorize_svd{ratio=0.6}; recover{scope=local,steps=3}"), ("llama", "prune_wanda{sparsity=0.5}; recover{steps=3,dtype=bf16}"),
)  # fmt: skip


def of_one_length(name: str) -> Program:
    """The tiny model with a dynamic batch at most; `cached`: the llama with its cache."""
    if name == "cached":
        return fxpress.capture_causal_lm(tiny("llama").model)
    model = tiny(name)
    if not isinstance(model.example_inputs, dict):
        return fresh_program(name)
    return capture(model.model, model.example_inputs, dynamic_shapes={key: {0: Dim("batch", min=1, max=64)} for key in model.example_inputs})


def data(name: str) -> list[Any]:
    """Calls like the example of `name`, on the CPU."""
    args, kwargs = tiny("llama" if name == "cached" else name).call
    kwargs = kwargs | ({"attention_mask": torch.ones_like(kwargs["input_ids"])} if name == "cached" else {})
    if "input_ids" in kwargs:
        batch, length = kwargs["input_ids"].shape
        return [{**kwargs, "input_ids": tokens(batch, length, seed=i)} for i in range(4)]
    return [tuple(randn(*a.shape, seed=i) for a in args) if args else {k: randn(*v.shape, seed=i) for k, v in kwargs.items()} for i in range(4)]


def test_every_pass_is_tried_on_a_gpu() -> None:
    assert {parse_pass(spec.strip()).name for _, recipe in RECIPES for spec in recipe.split(";")} == set(pass_names())


def test_on_the_cpu_nothing_is_set() -> None:
    program = fresh_program("mlp")
    with working_on(program):
        assert not torch.overrides._get_current_function_mode_stack()
    assert waiting_for(program) is None and program.device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_a_pass_does_on_the_gpu_what_it_does_on_the_cpu(name: str, recipe: str) -> None:
    specs = [spec.strip() for spec in recipe.split(";")]
    here = fxpress.optimize(of_one_length(name), specs, calibration=data(name))
    there = fxpress.optimize(of_one_length(name).to("cuda"), specs, calibration=data(name))
    assert there.program.device.type == "cuda"
    assert [len(r.taken) for r in there.reports] == [len(r.taken) for r in here.reports]
    assert there.program.nbytes == pytest.approx(here.program.nbytes, rel=0.05)
    pairs = zip(outputs(there.program.to("cpu")), outputs(here.program), strict=True)
    assert max(relative_error(got, wanted) for got, wanted in pairs) < 0.3, "near ties fall otherwise, the rest is rounding"


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_captured_measured_saved_and_exported(tmp_path: Path) -> None:
    model = tiny("llama")
    moved = type(model.model)(model.model.config).eval().cuda()
    program = capture(moved, model.example_inputs, dynamic_shapes={key: {0: Dim("batch", min=1, max=64)} for key in model.example_inputs})
    result = fxpress.optimize(program, "quantize_gptq{bits=4,group_size=8}", calibration=data("llama"), checkpoint_dir=tmp_path / "checkpoint")
    again = fxpress.optimize(program, "quantize_gptq{bits=4,group_size=8}", calibration=data("llama"), checkpoint_dir=tmp_path / "checkpoint")
    recipe = ["factorize_svd{ratio=0.6}", "recover{steps=4,evaluate_every=2,checkpoint_every=1}"]
    for _ in range(2):
        fxpress.optimize(program, recipe, calibration=data("llama"), checkpoint_dir=tmp_path / "training")
    windows = tokens(2, 8)
    scores = [perplexity(logits_of(m), windows).perplexity for m in (result.program, again.program, moved)]
    assert scores[0] == pytest.approx(scores[1]) and scores[0] == pytest.approx(scores[2], rel=0.5)
    result.save(tmp_path / "artifact")
    assert perplexity(logits_of(fxpress.load(tmp_path / "artifact").program), windows).perplexity == pytest.approx(scores[0], rel=1e-3)
    assert result.diff().to_text() and str(fxpress.optimize(program, "factorize_svd{ratio=0.7}", calibration=data("llama"), dry_run=True))
    assert result.export_onnx(tmp_path / "model.onnx").max_error < 1e-3


@pytest.mark.gpu
def test_a_model_on_two_devices_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).cuda())
    with pytest.raises(CaptureError, match="lie on 2 devices"):
        capture(model, (torch.zeros(2, 4),))
