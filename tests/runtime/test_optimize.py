"""The facade on tiny real architectures: one call to a result that runs, attaches, saves, loads, diffs and exports."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpress
from fxpress.ir.errors import ArtifactError, CalibrationError, CaptureError, LowerError, PassError, SpecError
from fxpress.passes.base import Guarantee
from fxpress.passes.estimate import DryRun
from fxpress.passes.quantize_rtn import QuantizeRtn

from ..checks import assert_same
from ..grouping import some_slow
from ..tiny import TinyModel

Zoo = Callable[[str], TinyModel]


def run(program: fxpress.Program, tiny: TinyModel) -> Any:
    """The program on the tiny model's example call."""
    return program.run_inputs(tiny.call)


@pytest.mark.parametrize("name", some_slow(["llama", "gpt2", "resnet"], "gpt2"))
def test_one_call_from_model_to_result(zoo: Zoo, name: str, tmp_path: Path) -> None:
    tiny = zoo(name)
    result = fxpress.optimize(
        tiny.model, ["prune_wanda{sparsity=0.5,allow_empty=true}", QuantizeRtn(bits=8)], example_inputs=tiny.example_inputs,
        dynamic_shapes=tiny.dynamic_shapes, calibration=[tiny.example_inputs],
    )  # fmt: skip
    assert result.original is not None and result.original.nbytes > result.program.nbytes
    assert result.guarantee is Guarantee.CALIBRATED
    summary = result.summary()
    assert "quantize_rtn" in summary and "bits per weight" in summary and "outputs on the example inputs" in summary
    assert repr(result).startswith("<Result: prune_wanda{allow_empty=true,sparsity=0.5} -> quantize_rtn{bits=8}; ") and " MB -> " in repr(result)
    assert repr(result.program).startswith("<Program: compressed, ") and len(repr(result)) < 200
    assert not result.diff().is_empty
    result.save(tmp_path / "artifact")
    again = fxpress.load(tmp_path / "artifact")
    assert_same(run(again.program, tiny), run(result.program, tiny))
    assert again.recipe == result.recipe and again.reports == result.reports and again.bytes_before == result.bytes_before
    assert_same(result.module(decoded=True)(*tiny.call[0], **tiny.call[1]), run(result.program, tiny))


def test_attached_llama_generates_with_its_cache(zoo: Zoo) -> None:
    tiny = zoo("llama")
    result = fxpress.optimize(tiny.model, "quantize_rtn{bits=8}", example_inputs=tiny.example_inputs, dynamic_shapes=tiny.dynamic_shapes)
    model: Any = result.attach(tiny.model)
    ids = torch.randint(0, 50, (1, 5))
    out = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    assert out.shape == (1, 11)


def test_yaml_recipe_and_seed_of_the_recipe(zoo: Zoo, tmp_path: Path) -> None:
    tiny = zoo("mlp")
    path = tmp_path / "recipe.yaml"
    path.write_text("passes:\n  - quantize_rtn: {bits: 4}\nseed: 7\n")
    result = fxpress.optimize(tiny.model, path, example_inputs=tiny.example_inputs, dynamic_shapes=tiny.dynamic_shapes)
    assert result.recipe.seed == 7 and result.recipe.specs == ("quantize_rtn{bits=4}",)


def test_dry_run_touches_nothing(zoo: Zoo) -> None:
    tiny = zoo("mlp")
    plan = fxpress.optimize(tiny.model, "quantize_rtn{bits=4}", example_inputs=tiny.example_inputs, dynamic_shapes=tiny.dynamic_shapes, dry_run=True)
    assert isinstance(plan, DryRun) and plan.passes[0].bytes_after < plan.passes[0].bytes_before


def test_the_model_is_left_as_it_was(zoo: Zoo) -> None:
    tiny = zoo("mlp")
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    fxpress.optimize(
        tiny.model, ["prune_magnitude{sparsity=0.9}", "quantize_rtn{bits=2}"], example_inputs=tiny.example_inputs, dynamic_shapes=tiny.dynamic_shapes
    )
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())


class Branching(nn.Module):
    """Cannot be exported: a Python branch on a tensor value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[3] -> [3]`."""
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": Branching(), "example_inputs": (torch.randn(3),)}, CaptureError, "torch.export cannot capture Branching.*torch.where"),
        ({"model": "net"}, CaptureError, "expected an nn.Module"),
        ({"example_inputs": None}, CaptureError, "example_inputs is missing"),
        ({"passes": "quantise{bits=4}"}, SpecError, "unknown pass 'quantise'"),
        ({"passes": "quantize_rtn{bits=4,grp=2}"}, SpecError, "unknown option 'grp'"),
        ({"passes": "quantize_rtn{bits=4,group_size=4096}"}, PassError, "wider than"),
        ({"passes": "quantize_gptq{bits=4}"}, CalibrationError, "needs calibration"),
        ({"passes": "quantize_gptq{bits=4}", "calibration": []}, CalibrationError, "calibration is empty"),
        ({"passes": "quantize_gptq{bits=4}", "calibration": [torch.randn(4, 5)]}, CalibrationError, "expected shape"),
    ],
)
def test_bad_input_gives_one_clear_error(zoo: Zoo, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    tiny = zoo("mlp")
    good: dict[str, Any] = {"model": tiny.model, "passes": "quantize_rtn{bits=4}", "example_inputs": tiny.example_inputs}
    arguments = good | change
    model, passes = arguments.pop("model"), arguments.pop("passes")
    with pytest.raises(kind, match=message):
        fxpress.optimize(model, passes, **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        net.get_parameter("1.weight")[2, 1] = value
    with pytest.raises(CaptureError, match=r"weight 1\.weight .* 1 NaN or infinite"):
        fxpress.optimize(net, "quantize_rtn{bits=4}", example_inputs=(torch.randn(2, 4),))


def test_unknown_target_and_lost_original_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    tiny = zoo("mlp")
    result = fxpress.optimize(tiny.model, "quantize_rtn{bits=4}", example_inputs=tiny.example_inputs, dynamic_shapes=tiny.dynamic_shapes)
    with pytest.raises(LowerError, match="unknown target 'tensorrt'"):
        result.lower("tensorrt")
    result.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="needs the original"):
        fxpress.load(tmp_path / "a").diff()


def test_optional_packages_are_not_imported_with_fxpress() -> None:
    import subprocess
    import sys

    code = "import fxpress, sys; print([m for m in ('transformers', 'onnx', 'onnxruntime', 'triton', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_extra_is_named(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = zoo("mlp")
    result = fxpress.optimize(tiny.model, "quantize_rtn{bits=4}", example_inputs=tiny.example_inputs, dynamic_shapes=tiny.dynamic_shapes)
    real = builtins.__import__

    def without_runtime(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_runtime)
    from fxpress.ir.errors import MissingExtraError
    from fxpress.runtime.onnx_session import open_session

    assert result.program.nbytes
    with pytest.raises(MissingExtraError, match=r"pip install 'fxpress\[onnx\]'"):
        open_session(tmp_path / "x.onnx")
