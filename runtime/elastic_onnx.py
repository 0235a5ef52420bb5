"""A nested model at several widths in ONNX: one graph a width, all weights in one file, a narrow model's being ranges of the full one's."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..codegen.onnx_target.check import Mode, check_file
from ..codegen.onnx_target.export import FUSED_TOLERANCE, default_tolerance, save
from ..codegen.onnx_target.lowering import Onnx
from ..codegen.onnx_target.shared_data import share
from ..ir.errors import ArtifactError, ExportError
from ..ir.files import atomic_folder
from .onnx_session import open_session

if TYPE_CHECKING:
    from .elastic import Elastic, Width

DATA, MANIFEST = "weights.bin", "elastic.json"


@dataclass(frozen=True, kw_only=True)
class ElasticExport:
    """What was written. `apart_bytes`: what one data file for each width would hold. `errors`: per width the largest relative error of the exact run."""

    folder: str
    files: tuple[str, ...]
    data_bytes: int
    apart_bytes: int
    errors: tuple[float, ...]

    def __str__(self) -> str:
        shared = f"{self.data_bytes / 1e6:.1f} MB of weights for {len(self.files)} widths ({self.apart_bytes / 1e6:.1f} MB in files of their own)"
        return f"{self.folder}: {shared}; largest error {max(self.errors):.1e}"


def export_elastic(elastic: Elastic, folder: str | Path, widths: Sequence[Width], *, opset: int | None = None) -> ElasticExport:
    """Write one checked graph for each of the `widths` (the first being the widest) and one data file into `folder`.

    Nothing is left behind when a check fails (`ExportError`).
    """
    programs = [elastic.at(w) for w in widths]
    if not programs or any(p.parameters > programs[0].parameters for p in programs):
        raise ExportError("export_elastic: expected at least one width, the widest first, for example widths=[1.0, 0.5, 0.25]")
    models = [Onnx(opset=opset).lower(p).artifact for p in programs]
    files = [f"width-{place}.onnx" for place in range(len(models))]
    with atomic_folder(Path(folder), own=("width-*.onnx", DATA, MANIFEST)) as scratch:
        shared = share(models, scratch / DATA)
        errors = []
        for program, model, name in zip(programs, models, files, strict=True):
            save(model, scratch / name, external=False)
            bounds = {Mode.EXACT: default_tolerance(program), Mode.DEFAULT: FUSED_TOLERANCE}
            checks = check_file(scratch / name, program, bounds=bounds).checks
            errors.append(max(c.error for c in checks if c.mode is Mode.EXACT))
        entries = [{"width": list(w) if isinstance(w, Sequence) else w, "file": f} for w, f in zip(widths, files, strict=True)]
        (scratch / MANIFEST).write_text(json.dumps({"widths": entries}, indent=1) + "\n")
        for left in [p for p in scratch.iterdir() if p.name not in (*files, DATA, MANIFEST)]:
            left.unlink()
    return ElasticExport(folder=str(folder), files=tuple(files), data_bytes=shared.stored, apart_bytes=shared.apart, errors=tuple(errors))


class ElasticSession:
    """`session.run(feeds, width=0.5)` runs the graph of a width; sessions open at their first use and read one mapped file.

    `share` turns ONNX Runtime's prepacking off: a session then copies no weight, which costs little at one row and half of the speed at many
    (docs/passes/nest.md).
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None, share: bool = True) -> None:
        self.folder, self._threads, self._share = Path(folder), threads, share
        try:
            entries = json.loads((self.folder / MANIFEST).read_text())["widths"]
            self._files = {_key(e["width"]): str(e["file"]) for e in entries}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder}: expected a folder that Elastic.export_onnx wrote, with {MANIFEST}; got {type(error).__name__}: {error}") from error
        self._sessions: dict[Any, Any] = {}
        self._lock = threading.Lock()

    @property
    def widths(self) -> tuple[Any, ...]:
        """The widths there are graphs for."""
        return tuple(self._files)

    def at(self, width: Width) -> Any:
        """The ONNX Runtime session of a width."""
        key = _key(width)
        if key not in self._files:
            raise ArtifactError(f"{self.folder} holds no width {width}; there are {', '.join(map(str, self._files))}")
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = open_session(self.folder / self._files[key], threads=self._threads, prepack=not self._share)
            return self._sessions[key]

    def run(self, feeds: Mapping[str, Any], *, width: Width, outputs: Sequence[str] | None = None) -> list[Any]:
        """Outputs (all, or those named) of a run at a width; `feeds` are numpy arrays by input name."""
        found: list[Any] = self.at(width).run(outputs, dict(feeds))
        return found


def _key(width: Any) -> Any:
    return tuple(width) if isinstance(width, Sequence) else width
