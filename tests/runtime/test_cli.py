"""The command line as a user runs it: a factory and a Hugging Face folder through optimize, show, diff; passes; doctor; errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxpress.ir.errors import SpecError
from fxpress.runtime import cli
from fxpress.runtime.cli import app

FACTORY = """
import torch
from torch import nn
def net():
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    return {"model": nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), "example_inputs": (x,), "calibration": [x]}
def broken():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `shop.py`, made the current one."""
    (tmp_path / "shop.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("shop", None)
    return tmp_path


def run(*args: str) -> str:
    """Standard output of a command that must succeed."""
    done = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_optimize_show_and_diff_on_a_factory(factory: Path) -> None:
    out = run("optimize", "shop:net", "--out", "out", "--pass", "prune_wanda{sparsity=0.5}", "--pass", "quantize_gptq{bits=4,group_size=16}")
    assert "prune_wanda" in out and "x smaller" in out
    assert {p.name for p in Path("out").iterdir()} == {"artifact", "model.onnx", "diff.html", "summary.txt"}
    assert "fxpress.linear" in run("show", "out/artifact")
    assert "affine{bits=4" in run("show", "out/artifact", "--sites")
    assert "affine" in run("diff", "shop:net", "out/artifact", "--html", "d.html")
    assert Path("d.html").stat().st_size > 1000
    assert CliRunner().invoke(app, ["diff", "shop:net", "out/artifact", "--fail-on-change"]).exit_code == 1
    assert CliRunner().invoke(app, ["diff", "shop:net", "shop:net", "--fail-on-change"]).exit_code == 0


def test_show_structure(factory: Path) -> None:
    lines = run("show", "shop:net", "--structure").splitlines()
    assert lines[0] == "0 layers, 0 residual blocks, 3 axis classes (1 free)"
    assert [line.strip("│├└─ ") for line in lines[1:]] == [
        "outside of blocks", "feed-forward, relu", "up 0: linear [32, 16]", "down 2: linear [8, 32]", "ffn, size 32: 0.weight[0], in 3 tensors",
        "other axis classes", "no role, size 16: 0.weight[1], in 1 tensor; pinned: an input of the model",
        "no role, size 8: 2.weight[0], in 2 tensors; pinned: an output of the model", "every operator has an axis rule",
    ]  # fmt: skip


def test_recipe_checkpoint_and_dry_run(factory: Path) -> None:
    Path("r.yaml").write_text("passes:\n  - quantize_gptq: {bits: 4}\n")
    text = run("optimize", "shop:net", "--recipe", "r.yaml", "--dry-run")
    assert "2 sites taken" in text and not Path("fxpress-out").exists()
    run("optimize", "shop:net", "--recipe", "r.yaml", "--no-onnx", "--checkpoint", "ck", "--out", "out")
    assert list(Path("ck").glob("*.safetensors")) and not Path("out/model.onnx").exists()


def test_huggingface_folder_with_calibration_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    folder = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate("abcdefgh")} | {"?": 8}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    (tmp_path / "text.txt").write_text("abcdefgh" * 40)
    out = run(
        "optimize", str(folder), "--pass", "quantize_gptq{bits=4,group_size=16}", "--calibration", str(tmp_path / "text.txt"),
        "--windows", "4", "--length", "16", "--no-onnx", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert "15" in out  # 2 x 7 linears and the tied lm_head
    assert "lm_head" in run("show", str(tmp_path / "out" / "artifact"), "--sites")


def test_passes_lists_all_and_explains_one() -> None:
    text = run("passes")
    assert all(name in text for name in ("fold_affine", "prune_magnitude", "prune_wanda", "quantize_rtn", "quantize_gptq"))
    assert "damping" in run("passes", "quantize_gptq")


def test_doctor_passes_here() -> None:
    text = run("doctor")
    assert "failed" not in text and text.count("passed") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "nowhere", "-p", "fold_affine"], "expected a Hugging Face folder"),
        (["optimize", "shop:missing", "-p", "fold_affine"], "missing"),
        (["optimize", "shop:broken", "-p", "fold_affine"], "the factory returned int"),
        (["optimize", "shop:net"], "give either --pass"),
        (["optimize", "shop:net", "-p", "fold_afine"], "did you mean 'fold_affine'"),
        (["passes", "nothing"], "unknown pass 'nothing'"),
        (["show", "."], "not a Hugging Face folder"),
        (["show", "shop:net", "--sites", "--structure"], "give one of them"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(factory: Path, arguments: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fxpress", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.count("error (") == 1
    assert {p.name for p in factory.iterdir()} <= {"shop.py", "__pycache__"}


def test_lowering_for_a_gpu_that_is_not_here(factory: Path) -> None:
    pytest.importorskip("triton")
    recipe = ("--pass", "prune_magnitude{pattern=16:32,only=['2']}", "--pass", "quantize_rtn{bits=4}", "--pass", "store_sparse{only=['2']}")
    printed = run("optimize", "shop:net", *recipe, "--out", "out", "--no-onnx", "--dtype", "float16", "--target", "triton", "--device", "a6000")
    assert "lowered to triton for a6000:" in printed and printed.count("fxpress_triton.linear") == 2
    with pytest.raises(SpecError, match="--device goes with --target triton"):
        run("optimize", "shop:net", *recipe, "--device", "a6000")
