"""What the commands of the command line do."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..ir.errors import SpecError
from ..ir.program import Program
from ..ir.structure import find_structure
from ..passes.base import Pass, SitePass, pass_class, pass_names
from .causal_lm import capture_causal_lm
from .generation import Sampling
from .optimize import optimize
from .sources import Source, load_source


@dataclass(frozen=True)
class GenerateRequest:
    """Arguments of `fxpress generate`."""

    folder: Path
    prompt: str
    tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    longest: int | None
    threads: int | None


def run_generate(request: GenerateRequest) -> None:
    """Load the folder and write the continuation as it comes."""
    from .serving import Served

    served = Served(request.folder, longest=request.longest, threads=request.threads)
    for piece in served.stream(request.prompt, most=request.tokens, sampling=request.sampling, stops=request.stops):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


@dataclass(frozen=True, kw_only=True)
class OptimizeRequest:
    """Arguments of `fxpress optimize`."""

    model: str
    out: Path
    passes: Path | list[str]
    calibration: Path | None
    windows: int
    length: int
    onnx: bool
    seed: int
    checkpoint: Path | None
    dry_run: bool
    target: str | None = None
    device: str | None = None
    dtype: str | None = None
    serve: bool = False


def _tokenizer(source: Source) -> Any:
    if source.tokenizer is None:
        raise SpecError("--serve: this source has no tokenizer; give a Hugging Face folder with one")
    return source.tokenizer


def run_optimize(request: OptimizeRequest) -> None:
    """Load, optimize, write `artifact/`, `model.onnx` (or `serving/`), `diff.html` and `summary.txt`."""
    source = load_source(request.model)
    if request.dtype is not None:
        source = source.cast(getattr(torch, request.dtype))
    calibration: Any = source.calibration or None
    if request.calibration is not None:
        calibration = source.text_batches(request.calibration, windows=request.windows, length=request.length)
    options: dict[str, Any] = {"calibration": calibration, "seed": request.seed}
    tokenizer = _tokenizer(source) if request.serve else None
    program = capture_causal_lm(source.model) if request.serve else source.capture()
    if request.dry_run:
        typer.echo(optimize(program, request.passes, dry_run=True, **options))
        return
    result = optimize(program, request.passes, progress=True, checkpoint_dir=request.checkpoint, **options)
    result.save(request.out / "artifact")
    text = result.summary()
    if request.serve:
        text += str(result.save_serving(request.out / "serving", source.model, tokenizer, progress=True)) + "\n"
    elif request.onnx:
        text += str(result.export_onnx(request.out / "model.onnx", progress=True)) + "\n"
    if request.target is not None:
        report = result.lower_with_report(request.target, device=request.device).report
        text += f"lowered to {request.target}{f' for {request.device}' if request.device else ''}:\n{report}\n"
    result.diff().to_html(request.out / "diff.html")
    (request.out / "summary.txt").write_text(text, encoding="utf-8")
    typer.echo(text + f"written: {', '.join(sorted(str(p) for p in request.out.iterdir()))}")


def load_program(where: str) -> Program:
    """A program from an artefact folder, or captured from a model."""
    if (Path(where) / "manifest.json").exists():
        from .artifact import load

        return load(where).program
    return load_source(where).capture()


def run_diff(before: str, after: str, html: Path | None) -> bool:
    """Print the diff by matching; True when the programs differ."""
    from ..ir.diff import GraphDiff

    diff = GraphDiff.between(load_program(before), load_program(after))
    typer.echo(diff.to_text())
    if html is not None:
        diff.to_html(html)
        typer.echo(f"written: {html}")
    return not diff.is_empty


def run_show(what: str, *, sites: bool, structure: bool = False) -> None:
    """Print the graph, a table of sites, or the structure as a tree."""
    if sites and structure:
        raise SpecError("show: --sites and --structure are two views; give one of them")
    program = load_program(what)
    if structure:
        typer.echo(find_structure(program).to_text())
        return
    if not sites:
        typer.echo(program.to_text())
        return
    table = Table("site", "kind", "shape", "format", "bytes", "tied to")
    for s in program.sites():
        table.add_row(s.name, s.kind.value, str(list(s.shape)), s.format.to_spec(), f"{s.nbytes:,}", ", ".join(s.tied))
    Console().print(table)


def run_passes(name: str | None) -> None:
    """Print all passes with their first doc line, or one with its options."""
    if name is None:
        table = Table("pass", "guarantee", "data", "what it does")
        for n in pass_names():
            cls = pass_class(n)
            table.add_row(n, cls.guarantee.value, "needed" if _may_need_data(cls) else "no", _module_line(cls))
        Console().print(table)
        return
    cls = pass_class(name)
    typer.echo(f"{name}: {_module_line(cls)}\n\n{cls.__doc__}\n")
    table = Table("option", "type", "default")
    hints = get_type_hints(cls)
    for f in fields(cls):
        default = "required" if f.default is MISSING else str(getattr(f.default, "value", f.default))
        table.add_row(f.name, _type_text(hints[f.name]), default)
    Console().print(table)


def _type_text(hint: Any) -> str:
    """A type as a user writes its values: the choices of an enum, the names of plain types, `list of` for tuples."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(m.value) for m in hint)
    inner = [a for a in get_args(hint) if a is not Ellipsis]
    if get_origin(hint) is tuple:
        return f"list of {_type_text(inner[0])}"
    return " | ".join(map(_type_text, inner)) if inner else getattr(hint, "__name__", str(hint)).replace("NoneType", "none")


def _may_need_data(cls: type[Pass]) -> bool:
    return cls.uses_data or (issubclass(cls, SitePass) and cls.needs is not SitePass.needs)


def _module_line(cls: type) -> str:
    return (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
