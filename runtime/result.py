"""`Result`: what `optimize` and `load` return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..ir.errors import ArtifactError
from ..ir.program import Program
from ..passes.base import Guarantee, PassReport
from ..passes.pipeline import Outcome
from ..passes.recipe import Recipe

if TYPE_CHECKING:
    from ..codegen.onnx_target import OnnxReport
    from ..codegen.target import Lowered
    from ..ir.diff import GraphDiff


@dataclass(frozen=True, repr=False)
class Result:
    """A compressed program with everything one may want to do with it.

    `original` is the program as captured; it is None after `load`, which does not store the uncompressed weights. `notes` say what
    `load` could not bring back as it was.
    """

    program: Program
    reports: tuple[PassReport, ...]
    recipe: Recipe
    original: Program | None = None
    bytes_before: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.original is not None and not self.bytes_before:
            object.__setattr__(self, "bytes_before", self.original.nbytes)

    def __repr__(self) -> str:
        passes = " -> ".join(r.pass_spec for r in self.reports) or "no passes"
        return f"<Result: {passes}; {self.bytes_before / 1e6:.2f} MB -> {self.program.nbytes / 1e6:.2f} MB; see .summary()>"

    @property
    def guarantee(self) -> Guarantee:
        """Weakest guarantee of the passes."""
        return Outcome(self.program, self.reports).guarantee

    def summary(self) -> str:
        """Per pass: sites taken and skipped (with reasons), bytes, errors; totals, true bits per weight, and the outputs' error on the example inputs."""
        from .measure import parity
        from .summary import summary_text

        text = summary_text(self.program, self.reports, self.bytes_before)
        if self.original is None:
            return text
        found = parity(self.original, self.program)
        return f"{text}outputs on the example inputs: largest error {found.max_rel_error:.2e} of the largest output (guarantee: {self.guarantee.value})\n"

    def module(self, *, decoded: bool = False) -> nn.Module:
        """The compressed graph as an nn.Module with the model's own signature.

        Compressed sites decode on every call; `decoded=True` decodes once instead: faster, and as large in memory as the dense model.
        """
        module: nn.Module = self.lower("reference").graph_module if decoded else self.program.graph_module
        return module

    def attach(self, model: nn.Module, *, keep_decoded: bool = False) -> nn.Module:
        """A copy of the user's own module with compressed sites swapped in, so that its other methods (HF `generate`) run on them."""
        from .attach import attach

        return attach(model, self._original("attach"), self.program, keep_decoded=keep_decoded)

    def export_onnx(
        self, path: str | Path, *, opset: int | None = None, external_data: bool | None = None, portable: bool = False, progress: bool = False
    ) -> OnnxReport:
        """Write a checked ONNX file with real low-bit weights; see `docs/onnx.md`."""
        from ..codegen.onnx_target import export_onnx

        return export_onnx(self.program, path, opset=opset, external_data=external_data, portable=portable, progress=progress)

    def save_serving(
        self, folder: str | Path, model: nn.Module, tokenizer: Any, *, portable: bool = False, all_logits: bool = False, progress: bool = False
    ) -> OnnxReport:
        """Write a folder that `fxpress generate` and onnxruntime-genai load: a model captured by `capture_causal_lm`, its tokenizer and configs."""
        from .serving import save_serving

        return save_serving(self.program, model, tokenizer, folder, portable=portable, all_logits=all_logits, progress=progress)

    def lower(self, target: str, *, device: str | None = None) -> Any:
        """What a target makes of the program: `reference` a `Program` of plain operators, `onnx` an ONNX model in memory, `triton` a `Program` of kernels.

        `device` (Triton only, such as `h100`) chooses each weight's form by the cost model. `lower_with_report` says what became of every site.
        """
        return self.lower_with_report(target, device=device).artifact

    def lower_with_report(self, target: str, *, device: str | None = None) -> Lowered[Any]:
        """As `lower`, with the report: what every weight site became, why, and its bytes."""
        from ..codegen import target_named

        return target_named(target, **({} if device is None else {"device": device})).lower(self.program)

    def diff(self) -> GraphDiff:
        """What changed in the graph, by which pass, and why."""
        from ..ir.diff import GraphDiff

        return GraphDiff.from_journal(self._original("diff"), self.program)

    def save(self, folder: str | Path) -> Path:
        """Write the artefact folder: safetensors, JSON manifest with graph, journal, reports and recipe; no pickle."""
        from .artifact import save

        return save(folder, self.program, reports=self.reports, recipe=self.recipe, bytes_before=self.bytes_before)

    def save_pretrained(self, folder: str | Path, model: nn.Module, *, tokenizer: Any = None) -> Path:
        """Write a Hugging Face folder of the smaller model, which `from_pretrained` loads; `model` is the one that was compressed. See `runtime.pretrained`."""
        from .pretrained import save_pretrained

        return save_pretrained(self.program, model, folder, tokenizer=tokenizer)

    def _original(self, what: str) -> Program:
        if self.original is None:
            raise ArtifactError(f"{what} needs the original program, which a loaded artefact does not hold; call it on the Result of fxpress.optimize")
        return self.original
