"""Programs lowered to Triton compute what the reference computes, and the report says what was decoded and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import fxpress
from fxpress.codegen.triton_target import Triton
from fxpress.ir.capture import capture
from fxpress.ir.errors import LowerError
from fxpress.ir.program import Program, Stage

from .weights import DEVICE, EITHER


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.conv = nn.Linear(96, 128), nn.Linear(128, 40, bias=False), nn.Conv1d(1, 2, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.down(torch.relu(self.up(x))), self.conv(x[:, :1])


def _program(dtype: torch.dtype = torch.float16) -> Program:
    torch.manual_seed(0)
    return capture(_Net().to(dtype), (torch.randn(2, 3, 96).to(dtype),))


@pytest.mark.parametrize("dtype", EITHER)
@pytest.mark.parametrize(
    "recipe",
    [
        "quantize_rtn{bits=4,group_size=32}",
        "quantize_rtn{bits=3,symmetric=true}",
        "quantize_rtn{bits=8,granularity=tensor}",
        "quantize_lut{bits=4,sensitivity=uniform,refine=off}",
        "quantize_lut{bits=3,rows_per_table=none,sensitivity=uniform,refine=off}",
        "quantize_lut{bits=4,outliers=0.01,sensitivity=uniform,refine=off}",
    ],
)
def test_lowered_equals_the_reference(recipe: str, dtype: torch.dtype) -> None:
    result = fxpress.optimize(_program(dtype), [recipe.replace("}", ",kinds=[linear]}")])
    lowered = Triton().lower(result.program)
    assert [r.fused for r in lowered.report.sites] == [True, True, False]
    program = lowered.artifact.to(DEVICE)
    program.verify()
    for ours, exact in zip(program.run_examples(), result.lower("reference").run_examples(), strict=True):
        torch.testing.assert_close(ours.cpu(), exact, rtol=2e-2, atol=(8 if dtype is torch.bfloat16 else 1) * 2e-3)


def test_the_report_says_why_a_site_is_decoded() -> None:
    result = fxpress.optimize(_program(), ["quantize_rtn{bits=4,group_size=24,only=[up]}", "quantize_rtn{bits=4,only=[conv]}"])
    up, down, conv = Triton().lower(result.program).report.sites
    assert up.why == "decoded: groups of 24 columns are no whole tiles; use group_size 32, 64 or a multiple of 128"
    assert (down.why, conv.why) == ("not compressed", "decoded: conv1d weights have no kernel; only linears do")
    single = fxpress.optimize(_program(torch.float32), ["quantize_rtn{bits=4,only=[up]}"])
    assert "computes in torch.float32" in Triton().lower(single.program).report.sites[0].why


def test_lowering_leaves_the_compressed_program_alone() -> None:
    result = fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"])
    before = result.program.to_text()
    lowered = Triton().lower(result.program).artifact
    assert lowered.stage is Stage.LOWERED and "fxpress_triton.linear" in lowered.to_text() and result.program.to_text() == before


def test_what_no_kernel_can_read_is_refused_at_the_call() -> None:
    lowered = Triton().lower(fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"]).program).artifact.to(DEVICE)
    node = next(n for n in lowered.graph.nodes if "fxpress_triton" in str(n.target))
    weight = [getattr(lowered.graph_module.get_submodule(a.target.rpartition(".")[0]), a.target.rpartition(".")[2]) for a in node.args[1]]
    call = torch.ops.fxpress_triton.linear
    with pytest.raises(LowerError, match=r"expected torch.float16 data, got torch.float32"):
        call(torch.randn(2, 96, device=DEVICE), weight, None, node.args[3], 128)
    strided = [t if i != 3 else torch.stack([t, t], -1)[..., 0] for i, t in enumerate(weight)]
    with pytest.raises(LowerError, match=r"the stored tensor 'values' is not contiguous"):
        call(torch.randn(2, 96, device=DEVICE).half(), strided, None, node.args[3], 128)
    assert call(torch.empty(0, 96, device=DEVICE).half(), weight, None, node.args[3], 128).shape == (0, 128)


def test_machines_without_a_gpu_get_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpress.codegen.triton_target.launch.NATIVE", True)
    lowered = Triton().lower(fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"]).program).artifact
    with pytest.raises(LowerError, match=r"need a CUDA device, got tensors on cpu.*lower\('reference'\)"):
        lowered.run_examples()


def test_large_batches_use_the_rebuilt_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"])
    monkeypatch.setattr("fxpress.codegen.triton_target.operators.LARGE", 2)
    monkeypatch.setattr("fxpress.codegen.triton_target.launch.matmul", None)
    lowered = Triton().lower(result.program).artifact.to(DEVICE)
    torch.testing.assert_close(lowered.run_examples()[0].cpu(), result.lower("reference").run_examples()[0], rtol=2e-2, atol=2e-3)


def test_the_operator_is_traced_without_being_run() -> None:
    lowered = Triton().lower(fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"]).program).artifact
    exported = lowered.to_exported()
    assert sum("fxpress_triton" in str(n.target) for n in exported.graph.nodes) == 2


def test_tied_weights_count_once(captured: Callable[[str], Program]) -> None:
    report = Triton().lower(captured("embedding")).report
    assert sum(r.nbytes for r in report.sites) < report.nbytes + 1 and any("shares the tensor of" in r.why for r in report.sites)


def test_compiled_programs_keep_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole graphs, no breaks, with dynamic batch sizes too; the compiler sees shapes through the fake kernel only."""
    lowered = Triton().lower(fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"]).program).artifact.to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(lowered.graph_module, backend="aot_eager", fullgraph=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 96, device=DEVICE).half()
        for ours, plain in zip(compiled(x), lowered.graph_module(x), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_reach_data_and_biases(compiled: bool) -> None:
    result = fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"])
    plain, lowered = result.lower("reference").graph_module.to(DEVICE), Triton().lower(result.program).artifact.to(DEVICE).graph_module
    torch._dynamo.reset()
    model = torch.compile(lowered, backend="aot_eager", fullgraph=True) if compiled else lowered
    found = []
    for call, module in ((model, lowered), (plain, plain)):
        bias = next(p for name, p in module.named_parameters() if "up" in name and "bias" in name).requires_grad_()
        x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)).half().to(DEVICE).requires_grad_()
        call(x)[0].square().sum().backward()
        found.append((x.grad, bias.grad))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("layout", ["transposed", "strided", "shifted"])
def test_data_of_any_strides_and_alignment(layout: str) -> None:
    """Strided data is copied first; for data that does not begin on 16 bytes Triton compiles a variant without wide loads."""
    lowered = Triton().lower(fxpress.optimize(_program(), ["quantize_rtn{bits=4,kinds=[linear]}"]).program).artifact.to(DEVICE)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    same = {
        "transposed": lambda: x.transpose(0, 2).contiguous().transpose(0, 2),
        "strided": lambda: torch.stack([x, x], -1).flatten(2)[..., ::2],
        "shifted": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    }[layout]()
    assert torch.equal(lowered.graph_module(same)[0], lowered.graph_module(x)[0])
