"""Write a compressed program to an ONNX file whose size is its weights, and check the file before it takes its place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...ir.errors import ExportError
from ...ir.files import atomic_file
from ...ir.nodes import node_type
from ...ir.program import Program
from ...passes.progress import spinner
from ..target import LoweringReport
from .cached_attention import CACHE_PROPERTY, IN_PLACE
from .check import Check, Checked, Mode, check_file
from .lowering import Onnx
from .text import report_text

if TYPE_CHECKING:
    import onnx_ir

FUSED_TOLERANCE = 0.25  # of ONNX Runtime's default run
PROTOBUF_LIMIT = 1_900_000_000  # a protobuf message ends at 2 GiB
GRAPH_BYTES_PER_NODE, GRAPH_BYTES = 400, 8192


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """What was written and how it was checked.

    `caches_in_place`: caches may be buffers with room to spare (docs/serving.md). `fused`: MatMulNBits nodes in ONNX Runtime's optimized graph (0 when
    unchecked).
    """

    lowering: LoweringReport
    path: str
    opset: int
    file_bytes: int
    external_data: bool
    caches_in_place: bool
    fused: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def max_error(self) -> float:
        """Largest relative error of the exact runs (NaN when unchecked)."""
        return max((c.error for c in self.checks if c.mode is Mode.EXACT), default=float("nan"))

    @property
    def fused_error(self) -> float:
        """Largest relative error of the default, fused runs (NaN when unchecked)."""
        return max((c.error for c in self.checks if c.mode is Mode.DEFAULT), default=float("nan"))

    def __str__(self) -> str:
        return report_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"checks": [asdict(c) | {"mode": c.mode.value, "sizes": dict(c.sizes)} for c in self.checks]}


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int | None = None,
    tolerance: float | None = None,
    fused_tolerance: float = FUSED_TOLERANCE,
    check: bool = True,
    external_data: bool | None = None,
    portable: bool = False,
    merge: bool = False,
    progress: bool = False,
) -> OnnxReport:
    """Write `program` to the ONNX file `path` and return the report.

    `tolerance` bounds the error of the exact run relative to the largest output value (None: 1e-4, float16 models 2e-2), `fused_tolerance` that of
    ONNX Runtime's default run. `portable`: attention over caches in standard operators. `merge`: low-bit weights that
    read one input (query, key and value; gate and up) become one product, faster for a few tokens. `external_data` puts the weights into `<path>.data`
    beside the graph (None: only when they exceed 1.9 GB).
    Nothing is left behind when a check fails (`ExportError`).
    """
    steps = _Steps(progress)
    program = program if program.device.type == "cpu" else program.to("cpu")
    exact = tolerance if tolerance is not None else default_tolerance(program)
    checked = Checked(checks=(), fused=0, notes=("not checked: check=False",))
    with atomic_file(Path(path)) as scratch:
        written = _write(Onnx(opset=opset, portable=portable, merge=merge), program, scratch, external_data, steps)
        if check:
            with steps.step("check", "checking the file with ONNX Runtime"):
                checked = check_file(scratch, program, bounds={Mode.EXACT: exact, Mode.DEFAULT: fused_tolerance})
    return OnnxReport(
        lowering=written.lowering,
        path=str(path),
        opset=written.opset,
        file_bytes=written.file_bytes,
        external_data=written.external,
        caches_in_place=written.in_place,
        fused=checked.fused,
        checks=checked.checks,
        notes=(*checked.notes, *_fusion_note(written.lowering, checked)),
        seconds=steps.seconds,
    )


class _Steps:
    """Times the steps, and names them at the terminal when progress is shown."""

    def __init__(self, progress: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def step(self, name: str, label: str) -> Iterator[None]:
        """Time what happens inside as `name`."""
        start = time.perf_counter()
        with spinner(label, enabled=self._progress):
            yield
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class _Written:
    lowering: LoweringReport
    opset: int
    file_bytes: int
    external: bool
    in_place: bool


def _write(target: Onnx, program: Program, path: Path, external_data: bool | None, steps: _Steps) -> _Written:
    """Lower and write; the model in memory is gone before the file is checked."""
    with steps.step("lower", "lowering to ONNX"):
        lowered = target.lower(program)
    model, nbytes = lowered.artifact, lowered.report.nbytes
    external = nbytes > PROTOBUF_LIMIT if external_data is None else external_data
    with steps.step("write", f"writing {path.name}"):
        save(model, path, external)
    file_bytes = sum(f.stat().st_size for f in path.parent.iterdir())
    _check_size(file_bytes, nbytes, len(model.graph))
    return _Written(lowered.report, model.opset_imports[""], file_bytes, external, model.metadata_props.get(CACHE_PROPERTY) == IN_PLACE)


def save(model: onnx_ir.Model, path: Path, external: bool) -> None:
    """Write the model; `external`: its weights into `<path>.data` beside it. Tensors that lie in a file already stay there."""
    import onnx_ir as ir

    if external:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    else:
        ir.save(model, path)


def _check_size(file_bytes: int, nbytes: int, nodes: int) -> None:
    """The file must be its weights, within 2 % and a small graph."""
    allowed = int(1.02 * nbytes) + GRAPH_BYTES + GRAPH_BYTES_PER_NODE * nodes
    if file_bytes > allowed:
        raise ExportError(
            f"the file takes {file_bytes} bytes, but its weights are {nbytes} and its {nodes} nodes explain at most {allowed - nbytes} more; "
            "a weight is stored twice or in full precision: please report the model"
        )


def default_tolerance(program: Program) -> float:
    """Bound of the error of an exact run, relative to the largest output value; caches in 8 bits may round otherwise at ties."""
    types = (node_type(n) for n in program.graph.nodes if n.op != "get_attr")
    coarse = any(t is not None and t.dtype is torch.float16 for t in types) or any(v.dtype is torch.int8 for v in program.inputs.cached)
    return 2e-2 if coarse else 1e-4


def _fusion_note(report: LoweringReport, checked: Checked) -> tuple[str, ...]:
    expected = sum(s.fused for s in report.sites)
    if not checked.checks or checked.fused >= expected:
        return ()
    return (f"ONNX Runtime fused {checked.fused} of {expected} linears to MatMulNBits; the others run as DequantizeLinear + MatMul",)
