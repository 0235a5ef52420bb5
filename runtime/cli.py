"""The command line: `fxpress demo | optimize | generate | diff | show | passes | bench | doctor`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..ir.errors import FxpressError, SpecError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Compress PyTorch models by passes over their FX graph.")

bench = typer.Typer(no_args_is_help=True, help="Measure parts of fxpress on this machine.")
app.add_typer(bench, name="bench")


class FloatName(Enum):
    """Dtypes a model can be cast to."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class DemoName(Enum):
    """What `fxpress demo` shows."""

    LANGUAGE = "language"
    WAVE = "wave"


ModelArgument = Annotated[str, typer.Argument(help="Hugging Face folder, or package.module:factory returning (model, example_inputs)")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="folder to write")]


def main() -> None:
    """Entry point: one clear line for every error fxpress raises on purpose, exit code 2."""
    try:
        app()
    except FxpressError as error:
        typer.secho(f"error ({type(error).__name__}): {error}", fg="red", err=True)
        sys.exit(2)


@app.command()
def demo(
    what: Annotated[
        DemoName, typer.Argument(help="language: SmolLM2-135M to 4 bits; wave: a wave simulator of one-way filters, trained here")
    ] = DemoName.LANGUAGE,
    out: OutOption = Path("demo-out"),
    quick: Annotated[bool, typer.Option(help="so little data that it is a smoke test")] = False,
) -> None:
    """Compress a model, check it in ONNX Runtime, hold it against the dense one, and write files, pictures and report.md."""
    from ..examples.wave_simulator.demo import run_wave
    from .demo import run_demo

    {DemoName.LANGUAGE: run_demo, DemoName.WAVE: run_wave}[what](out, quick=quick)


@app.command()
def optimize(
    model: ModelArgument,
    out: OutOption = Path("fxpress-out"),
    passes: Annotated[list[str] | None, typer.Option("--pass", "-p", help="pass spec such as quantize_rtn{bits=4,group_size=64}; repeat in order")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe instead of --pass")] = None,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text file for passes that need data")] = None,
    windows: Annotated[int, typer.Option(help="calibration windows")] = 16,
    length: Annotated[int, typer.Option(help="tokens per calibration window")] = 512,
    onnx: Annotated[bool, typer.Option(help="also write a checked model.onnx")] = True,
    serve: Annotated[bool, typer.Option(help="a causal language model: capture it with its cache and write serving/ for `fxpress generate` instead")] = False,
    seed: Annotated[int, typer.Option(help="seed")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="folder to resume from after a kill")] = None,
    target: Annotated[str | None, typer.Option(help="also lower to this target and say what every site became: reference, onnx or triton")] = None,
    device: Annotated[str | None, typer.Option(help="with --target triton: choose each weight's form for a100, h100, h200, rtx4090 or a6000")] = None,
    dtype: Annotated[FloatName | None, typer.Option(help="cast the model first; Triton kernels compute in float16 or bfloat16")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print plan, legality, bytes, time and memory; touch nothing")] = False,
) -> None:
    """Run passes over a model and write the artefact, the ONNX file, the diff and the summary."""
    from .commands import OptimizeRequest, run_optimize

    if device is not None and target != "triton":
        raise SpecError("--device goes with --target triton")
    if (recipe is None) == (not passes):
        raise SpecError("give either --pass (repeatable) or --recipe; `fxpress passes` lists the passes")
    run_optimize(
        OptimizeRequest(
            model=model, out=out, passes=recipe if recipe is not None else list(passes or []), calibration=calibration, windows=windows, length=length,
            onnx=onnx, seed=seed, checkpoint=checkpoint, dry_run=dry_run, target=target, device=device, dtype=dtype.value if dtype else None,
            serve=serve,
        )
    )  # fmt: skip


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="a folder that Result.save_serving wrote")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    tokens: Annotated[int, typer.Option(help="most tokens to write")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw from so many of the most likely tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the most likely tokens that make this much of the probability")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="seed of the draws")] = 0,
    longest: Annotated[int | None, typer.Option(help="tokens to make room for; the model's context if left out")] = None,
    threads: Annotated[int | None, typer.Option(help="threads of ONNX Runtime")] = None,
) -> None:
    """Continue a text with a served model in ONNX Runtime, token by token."""
    from .commands import GenerateRequest, run_generate
    from .generation import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    run_generate(GenerateRequest(folder, prompt, tokens, sampling, tuple(stop or ()), longest, threads))


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="artefact folder, or a model as for optimize")],
    after: Annotated[str, typer.Argument(help="artefact folder, or a model as for optimize")],
    html: Annotated[Path | None, typer.Option(help="write a self-contained HTML page here")] = None,
    fail_on_change: Annotated[bool, typer.Option(help="exit with 1 when the programs differ")] = False,
) -> None:
    """Show what differs between two programs."""
    from .commands import run_diff

    changed = run_diff(before, after, html)
    if changed and fail_on_change:
        raise typer.Exit(1)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="artefact folder, or a model as for optimize")],
    sites: Annotated[bool, typer.Option("--sites", help="list the weight sites instead of the graph")] = False,
    structure: Annotated[bool, typer.Option("--structure", help="show layers, attention, feed-forward networks and axis classes instead of the graph")] = False,
) -> None:
    """Print a program as text, its weight sites as a table, or its structure as a tree."""
    from .commands import run_show

    run_show(what, sites=sites, structure=structure)


@app.command()
def passes(name: Annotated[str | None, typer.Argument(help="a pass, to see its options")] = None) -> None:
    """List the passes, or one pass with its options."""
    from .commands import run_passes

    run_passes(name)


@app.command()
def doctor() -> None:
    """Report versions and run a small end-to-end check."""
    from .doctor import run_doctor

    if not run_doctor():
        raise typer.Exit(1)


@bench.command()
def kernels(static: Annotated[bool, typer.Option("--static", help="compile ahead of time and count machine instructions; no GPU needed")] = False) -> None:
    """Costs of the Triton kernels. `--static` is the gate: exit code 1 when a variant breaks its limits."""
    from .bench import run_static

    if not static:
        raise SpecError("give --static; timings on a GPU are printed by benchmarks/lscd_gpu.py")
    if not run_static():
        raise typer.Exit(1)
