"""Checks of a written ONNX file: the format checker, and ONNX Runtime against the reference target, exact and fused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from ...ir.errors import ExportError
from ...ir.program import Program
from .extras import require
from .signature import input_names, output_names

Array = np.ndarray[Any, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]
CACHED = ({"new": 4, "past": 0}, {"new": 1, "past": 3}, {"batch": 1, "new": 4, "past": 3})
_ADVICE = "when an operator has no kernel for its type, capture model.float(); else try another opset="


class Mode(Enum):
    """How ONNX Runtime ran the file."""

    EXACT = "exact"  # graph optimizations disabled: the operators as written
    DEFAULT = "default"  # everything on: MatMulNBits quantizes activations to int8 block by block


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the decoded program, at the named axis sizes, for the worst output.

    `error` is the largest difference over the largest expected value, `rms` the root mean square of the difference over that of the expected
    values. The bound is on `error` in exact runs and on `rms` in default runs, where single values say little.
    """

    mode: Mode
    sizes: Mapping[str, int]
    output: str
    error: float
    rms: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Checked:
    """All comparisons, the number of MatMulNBits nodes ONNX Runtime made, and what could not be checked."""

    checks: tuple[Check, ...]
    fused: int
    notes: tuple[str, ...]


def check_file(path: Path, program: Program, *, bounds: Mapping[Mode, float]) -> Checked:
    """Check the file at `path` against `program`; an error above its bound raises `ExportError`."""
    onnx, ort = require("onnx", "checking an ONNX file"), require("onnxruntime", "checking an ONNX file")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"onnx.checker refuses the exported file: {_line(error)}; please report the model and this message") from error
    calls, notes = _calls(program)
    checks, fused = [], 0
    for mode, bound in bounds.items():
        session = _session(ort, path, mode)
        for sizes, feed, expected in calls:
            got = _run(session, feed, mode)
            checks.append(_compare(mode, sizes, got, expected, bound))
        fused = _fused_nodes(session) if mode is Mode.DEFAULT else fused
        del session
    return Checked(checks=tuple(checks), fused=fused, notes=tuple(notes))


def _calls(program: Program) -> tuple[list[tuple[dict[str, int], dict[str, Array], dict[str, Array]]], list[str]]:
    """(axis sizes, fed arrays, expected arrays) for the example inputs, and for one other legal size when axes are dynamic.

    With caches: a first call, the next token after it, and several tokens for a batch of one (ONNX Runtime takes no more rows there).

    The compressed program is run as it is: its operators decode one weight at a time, which is the reference's meaning without its memory.
    """
    if program.inputs.caches:
        return [_compared(program, pytree.tree_leaves(program.inputs.sized(sizes))) for sizes in CACHED], []
    calls = [_compared(program, program.inputs.leaves)]
    if not any(program.inputs.dynamic):
        return calls, []
    failures = []
    for leaves in _other_sizes(program):
        try:
            return [*calls, _compared(program, leaves)], []
        except Exception as error:
            failures.append(f"{_sizes(program, leaves)}: {_line(error)}")
    return calls, [f"checked at the example sizes only; the program itself fails at others ({'; '.join(failures) or 'no other size is legal'})"]


def _compared(program: Program, leaves: list[Any]) -> tuple[dict[str, int], dict[str, Array], dict[str, Array]]:
    call = pytree.tree_unflatten(leaves, pytree.tree_structure((program.inputs.args, program.inputs.kwargs)))
    return _sizes(program, leaves), _feed(program, leaves), _expected(program, program.run_inputs(call))


def _other_sizes(program: Program) -> Iterator[list[Any]]:
    """The example leaves with every dynamic axis one longer, then one shorter, where that is legal."""
    leaves = program.inputs.leaves
    known = _sizes(program, leaves)
    axes = [d for per_leaf in program.inputs.dynamic for d in per_leaf.values()]
    for step in (1, -1):
        if all(d.low <= known[d.name] + step * len(d.parts) <= (d.high or known[d.name] + step * len(d.parts)) for d in axes):
            yield pytree.tree_leaves(program.inputs.sized({name: size + step for name, size in known.items()}))


def _sizes(program: Program, leaves: list[Any]) -> dict[str, int]:
    return {known.name: leaves[i].shape[axis] for i, axes in enumerate(program.inputs.dynamic) for axis, known in axes.items()}


def _feed(program: Program, leaves: list[Any]) -> dict[str, Array]:
    return {name: leaves[i].detach().cpu().numpy() for i, name in input_names(program)}


def _expected(program: Program, result: Any) -> dict[str, Array]:
    leaves = pytree.tree_leaves(result, is_leaf=lambda x: x is None)
    return {name: leaves[i].numpy() for i, name in output_names(program) if isinstance(leaves[i], Tensor)}


def _session(ort: Any, path: Path, mode: Mode) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # give memory back between nodes and runs
    if mode is Mode.EXACT:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.enable_profiling = True
        options.profile_file_prefix = str(path.parent / "profile")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime {ort.__version__} cannot load the exported file ({mode.value}): {_line(error)}; {_ADVICE}") from error


def _run(session: Any, feed: dict[str, Array], mode: Mode) -> dict[str, Array]:
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in wanted}), strict=True))
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the exported file ({mode.value}): {_line(error)}; {_ADVICE}") from error


def _compare(mode: Mode, sizes: dict[str, int], got: dict[str, Array], expected: dict[str, Array], bound: float) -> Check:
    errors = {name: relative_errors(got[name], reference) for name, reference in expected.items()}
    judged = 0 if mode is Mode.EXACT else 1
    worst = max(errors, key=lambda name: errors[name][judged])
    if errors[worst][judged] <= bound:
        return Check(mode=mode, sizes=sizes, output=worst, error=errors[worst][0], rms=errors[worst][1], bound=bound)
    where = f"output {worst!r} {list(expected[worst].shape)}" + (f" at {sizes}" if sizes else "")
    measure = ("maximum error, relative to the largest value,", "root mean square error, relative to the values',")[judged]
    advice = {
        Mode.EXACT: "the file does not compute what the program computes: please report it, or raise tolerance= if the model amplifies rounding",
        Mode.DEFAULT: "ONNX Runtime's int8 activations cost this much here: raise fused_tolerance=, or use more bits for the layers before this output",
    }
    raise ExportError(f"{where}: {measure} is {errors[worst][judged]:.3g} in the {mode.value} run, expected at most {bound:g}; {advice[mode]}")


def relative_errors(got: Array, expected: Array) -> tuple[float, float]:
    """Maximum error over the largest finite value, and RMS error over the RMS value; for integers and booleans the share that differs, twice.

    Of int8 values (caches) the share of those that differ by more than the last rounding, as long as no more than 2 % differ at all, and the RMS error.
    """
    if got.shape != expected.shape:
        return float("inf"), float("inf")
    if expected.dtype == np.int8 and got.dtype == np.int8 and got.size:
        difference, values = got.astype(np.float64) - expected, expected.astype(np.float64)
        differs = np.mean(difference != 0)
        share = differs if differs > 0.02 else np.mean(abs(difference) > 1)
        return float(share), float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(values**2)), 1e-30))
    if not np.issubdtype(expected.dtype, np.floating):
        share = float(np.mean(got != expected)) if expected.size else 0.0
        return share, share
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf"), float("inf")
    if not finite.any():
        return 0.0, 0.0
    wide = expected[finite].astype(np.float64)
    difference, tiny = np.abs(got[finite] - wide), 1e-30
    return float(difference.max() / max(np.abs(wide).max(), tiny)), float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(wide**2)), tiny))


def _fused_nodes(session: Any) -> int:
    """MatMulNBits nodes that ran, read off the session's profile."""
    profile = Path(session.end_profiling())
    events = json.loads(profile.read_text())
    profile.unlink()
    return len({e["name"] for e in events if e.get("cat") == "Node" and e.get("args", {}).get("op_name") == "MatMulNBits"})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
