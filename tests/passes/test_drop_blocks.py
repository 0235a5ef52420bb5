"""Dropping residual blocks: equal to the model without them, least influence first, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxpress
from fxpress.ir.edit import Editor
from fxpress.ir.errors import CalibrationError, PassError, SpecError
from fxpress.ir.nodes import get_tensor

from ..checks import assert_same
from ..masking import outputs
from ..tiny import fresh_program, tiny

MODELS = ("llama", "opt", "gpt2", "bert", "vit", "resnet", "convnext", "mobilenet_v2")


def data(name: str) -> list[Any]:
    args, kwargs = tiny(name).call
    return [kwargs or args]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_one_goes_and_the_rest_runs(name: str, granularity: str) -> None:
    program = fresh_program(name)
    result = fxpress.optimize(program, f"drop_blocks{{count=1,granularity={granularity}}}", calibration=data(name))
    assert result.program.parameters < program.parameters
    assert all(torch.isfinite(o).all() for o in outputs(result.program))
    assert result.diff().counts[next(k for k in result.diff().counts if k.value == "removed")] > 3
    other = tiny(name).other
    if other is not None:
        result.program.run_inputs(other)


def test_a_dropped_layer_is_a_model_without_it() -> None:
    from transformers import LlamaForCausalLM

    source: Any = tiny("llama").model
    result = fxpress.optimize(fresh_program("llama"), "drop_blocks{count=1}", calibration=data("llama"))
    gone = int(result.reports[0].taken[0].site.split()[-1])
    config = type(source.config)(**(source.config.to_dict() | {"num_hidden_layers": 1}))
    model = LlamaForCausalLM(config).eval()
    state = {k.replace(f"layers.{1 - gone}.", "layers.0."): v for k, v in source.state_dict().items() if f"layers.{gone}." not in k}
    model.load_state_dict(state)
    call = tiny("llama").call
    with torch.no_grad():
        wanted = model(**call[1]).logits
    torch.testing.assert_close(outputs(result.program)[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_block_that_does_nothing_goes_first() -> None:
    program = fresh_program("llama")
    with Editor(program, "test") as editor:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensor = f"model.layers.0.{name}.weight"
            editor.set_tensor(tensor, torch.zeros_like(get_tensor(program.graph_module, tensor)))
    before = outputs(program)
    result = fxpress.optimize(program, "drop_blocks{count=1}", calibration=data("llama"))
    assert result.reports[0].taken[0].site == "layer 0"
    assert result.reports[0].taken[0].facts["influence"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(outputs(result.program), before)


def test_names_choose_among_layers() -> None:
    result = fxpress.optimize(fresh_program("llama"), "drop_blocks{count=1,skip=['layer 1']}", calibration=data("llama"))
    assert result.reports[0].taken[0].site == "layer 0"
    assert [s.why for s in result.reports[0].skipped] == ["matched skip pattern 'layer 1'"]


@pytest.mark.parametrize(
    ("name", "spec", "error", "message"),
    [
        ("llama", "drop_blocks", SpecError, "missing option 'count'"),
        ("llama", "drop_blocks{count=0}", SpecError, "must be >= 1"),
        ("llama", "drop_blocks{count=2}", PassError, "2 residual layers, 2 of which can go and at least one must stay"),
        ("conv", "drop_blocks{count=1}", PassError, "0 residual layers"),
        ("resnet", "drop_blocks{count=2}", PassError, "can go"),
    ],
)
def test_bad_requests_are_refused(name: str, spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fxpress.optimize(fresh_program(name), spec, calibration=data(name))


def test_data_are_asked_for_by_name() -> None:
    with pytest.raises(CalibrationError, match="block influence needs calibration data"):
        fxpress.optimize(fresh_program("llama"), "drop_blocks{count=1}")


def test_two_runs_are_equal_and_compose_with_quantization() -> None:
    recipe = ["drop_blocks{count=2,granularity=block}", "quantize_rtn{bits=8}"]
    first, second = (fxpress.optimize(fresh_program("gpt2"), recipe, calibration=data("gpt2")) for _ in range(2))
    assert_same(outputs(first.program), outputs(second.program))
    assert len(first.reports[0].taken) == 2
