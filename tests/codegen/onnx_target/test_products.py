"""Low-bit weights that read one input as one product: the same values, fewer kernels, honest reports; and what stays apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.codegen.onnx_target import OnnxReport, export_onnx
from fxpress.ir.program import Program
from fxpress.runtime.onnx_session import open_session

from ...runtime.test_serving import captured

FOUR = "quantize_rtn{bits=4,group_size=16}"


class Siblings(nn.Module):
    """Three linears of one input, and one of what they make."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, n, bias=bias) for n in (16, 48, 32))
        self.last = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x)
        return a, self.last(torch.tanh(self.c(x))) + a + self.b(x)[..., :16]


def both(program: Program, folder: Path) -> tuple[OnnxReport, list[onnx.NodeProto], list[Any], list[Any]]:
    """The merged report and nodes, and the outputs of merged and plain file."""
    outputs = []
    for merge in (True, False):
        report = export_onnx(program, folder / f"{merge}.onnx", merge=merge)
        feeds = {n: t.numpy() for n, t in zip([i.name for i in open_session(folder / f"{merge}.onnx").get_inputs()], program.inputs.leaves, strict=True)}
        outputs.append((report, open_session(folder / f"{merge}.onnx").run(None, feeds)))
    return outputs[0][0], list(onnx.load(str(folder / "True.onnx")).graph.node), outputs[0][1], outputs[1][1]


@pytest.mark.parametrize("options", ["bits=4,group_size=16", "bits=8,group_size=16", "bits=4,group_size=16,symmetric=true", "bits=2,group_size=16"])
@pytest.mark.parametrize("bias", [False, True])
def test_siblings_are_one_product_of_the_same_values(options: str, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = fxpress.optimize(Siblings(bias).eval(), f"quantize_rtn{{{options}}}", example_inputs=(torch.randn(2, 3, 32),)).program
    report, nodes, merged, plain = both(program, tmp_path)
    for a, b in zip(merged, plain, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-5, atol=1e-6)
    assert Counter(n.op_type for n in nodes)["MatMul"] == 2 and Counter(n.op_type for n in nodes)["Split"] == 1
    assert report.fused == 2 and not report.notes
    assert sum("in the product of another site" in s.form for s in report.lowering.sites) == 2


def test_unequal_forms_stay_apart(tmp_path: Path) -> None:
    recipe = ["quantize_rtn{bits=4,group_size=16,only=[a]}", "quantize_rtn{bits=8,group_size=16,only=[b]}", "quantize_rtn{bits=4,group_size=32,only=[c]}"]
    report, nodes, _, _ = both(fxpress.optimize(Siblings().eval(), recipe, example_inputs=(torch.randn(2, 3, 32),)).program, tmp_path)
    assert Counter(n.op_type for n in nodes)["MatMul"] == 4
    assert not any("in the product of" in s.form for s in report.lowering.sites)


def test_attention_takes_query_key_and_value_packed(tmp_path: Path) -> None:
    report = export_onnx(fxpress.optimize(captured(), FOUR).program, tmp_path / "model.onnx", merge=True)
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    attentions = [n for n in nodes if n.op_type == "GroupQueryAttention"]
    assert len(attentions) == 2 and all(list(n.input[1:3]) == ["", ""] for n in attentions)
    assert Counter(n.op_type for n in nodes)["Split"] == 2  # gate and up
    assert report.max_error < 1e-5 and report.fused == 2 * 4 + 1
