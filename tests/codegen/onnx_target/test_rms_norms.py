"""RMS norms as one operator, alone and with the sum before them; masks without their causal half; equal values, and nothing touched that is not that."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.codegen.onnx_target.causal_masks import leave_out_causality
from fxpress.codegen.onnx_target.cleanup import clean_up
from fxpress.codegen.onnx_target.export import export_onnx
from fxpress.codegen.onnx_target.lowering import Onnx
from fxpress.codegen.onnx_target.rms_norms import fuse_rms_norms, fuse_skip_norms
from fxpress.codegen.onnx_target.skeleton import export_skeleton
from fxpress.ir.cached_attention import fuse_cached_attentions
from fxpress.ir.edit import Editor
from fxpress.ir.nodes import op_name

from ...runtime.test_serving import captured

SKIP = "SkipSimplifiedLayerNormalization"


class Norms(nn.Module):
    """A norm of a sum, of what is no sum, over another axis, and of a sum with a constant."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.register_buffer("shift", torch.rand(2, 3, 8))

    def norm(self, x: Tensor, weight: Tensor, axis: int = -1) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(axis, keepdim=True) + 1e-5))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return self.norm(total, self.one), total, self.norm(x * y, self.two), self.norm(x + 2 * y, self.two, 1), self.norm(x + self.shift, self.two)


def test_only_norms_of_sums_over_the_last_axis_are_fused() -> None:
    program = fxpress.capture(Norms().eval(), (torch.randn(2, 3, 8), torch.randn(2, 3, 8)))
    model = export_skeleton(program, 21)
    clean_up(model)
    assert fuse_skip_norms(model) == 1
    skip = next(n for n in model.graph if n.op_type == SKIP)
    assert skip.domain == "com.microsoft" and skip.attributes["epsilon"].as_float() == pytest.approx(1e-5)
    clean_up(model)  # takes out what is dead
    assert fuse_rms_norms(model) == 2  # the product's and that of the sum with a constant


def test_norms_in_standard_operators_from_opset_23_on(tmp_path: Path) -> None:
    program = fxpress.capture(Norms().eval(), (torch.randn(2, 3, 8), torch.randn(2, 3, 8)))
    report = export_onnx(program, tmp_path / "model.onnx", opset=23)
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node)
    assert (kinds["RMSNormalization"], kinds["Sqrt"]) == (3, 1) and report.max_error < 1e-6


def test_a_language_model_runs_fewer_operators(tmp_path: Path) -> None:
    report = export_onnx(captured(), tmp_path / "model.onnx")
    export_onnx(captured(), tmp_path / "portable.onnx", portable=True)
    kinds, portable = (Counter(n.op_type for n in onnx.load(tmp_path / name).graph.node) for name in ("model.onnx", "portable.onnx"))
    assert kinds[SKIP] == 4 and kinds["Sqrt"] == 1 and kinds["GatherND"] == kinds["LessOrEqual"] == 0  # the first norm follows the embedding
    assert portable[SKIP] == portable["Sqrt"] == portable["Softmax"] == 0 and portable["LessOrEqual"]
    assert (portable["RMSNormalization"], portable["Attention"], portable["RotaryEmbedding"]) == (5, 2, 4)
    assert report.max_error < 1e-5 and Onnx(portable=True).lower(captured()).artifact.opset_imports.keys() == {""}


@pytest.mark.parametrize("odd", [False, True])
def test_only_causal_masks_lose_their_causal_half(odd: bool) -> None:
    program = captured().clone()
    with Editor(program, "test") as editor:
        fuse_cached_attentions(editor)
        masks = {n.args[5] for n in program.graph.nodes if op_name(n) == "fxpress.cached_attention"}
        if odd:  # a mask that also hides the first token from all others is none of ours
            (mask,) = masks
            assert isinstance(mask, torch.fx.Node)
            with program.graph.inserting_after(mask):
                other = program.graph.call_function(torch.ops.aten.triu.default, (mask,))
            other.meta = dict(mask.meta)
            mask.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        leave_out_causality(editor)
    names = {op_name(n) for n in program.graph.nodes}
    assert ("aten.le.Tensor" in names) is odd
