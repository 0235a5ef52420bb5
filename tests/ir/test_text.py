"""The printed form: golden text, and the same for every capture."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.export import Dim

from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.formats.affine import Affine
from fxpress.ir.program import Program

from ..tiny import TinyModel, randn

MLP = """\
program captured {
  %x : f32[s0, 12] = input
  %linear : f32[s0, 20] = aten.linear(%x, @up.weight:f32[20, 12], @up.bias:f32[20])  # up; site up, dense, 960 bytes
  %relu : f32[s0, 20] = aten.relu(%linear)
  %linear_1 : f32[s0, 6] = aten.linear(%relu, @down.weight:f32[6, 20])  # down; site down, dense, 480 bytes
  return [%linear_1]
}
"""

COMPRESSED = """\
program compressed {
  %x : f32[s0, 12] = input
  %linear : f32[s0, 20] = fxpress.linear(%x, [@up.weight_codes:ui8[20, 6], @up.weight_scale:f16[20, 2], @up.weight_zero_point:ui8[20, 1]], \
@up.bias:f32[20], 'affine{bits=4,group_size=8}', [20, 12])  # up; site up, affine{bits=4,group_size=8}, 220 bytes
  %relu : f32[s0, 20] = aten.relu(%linear)
  %linear_1 : f32[s0, 6] = aten.linear(%relu, @down.weight:f32[6, 20])  # down; site down, dense, 480 bytes
  return [%linear_1]
}
"""


def test_golden(captured: Callable[[str], Program]) -> None:
    assert captured("mlp").to_text() == MLP


def test_golden_compressed(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    site, fmt = program.sites()[0], Affine(bits=4, group_size=8)
    with Editor(program, "test") as editor:
        editor.compress(site, fmt, fmt.encode(site.matrix()), "test")
    assert program.to_text() == COMPRESSED


def test_captures_clones_and_idle_edits_print_equally(zoo: Callable[[str], TinyModel], captured: Callable[[str], Program]) -> None:
    tiny, program = zoo("llama_tied"), captured("llama_tied")
    again = capture(tiny.model, tiny.example_inputs, dynamic_shapes=tiny.dynamic_shapes)
    assert again.to_text() == program.to_text() == program.clone().to_text()
    with Editor(program, "test"):
        pass
    assert program.to_text().replace("lm_head.weight", "*") == again.to_text().replace("model.embed_tokens.weight", "*").replace("lm_head.weight", "*")


class Scaled(nn.Module):
    """Inputs and a module whose names look like torch's symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.s2 = nn.Linear(4, 4)

    def forward(self, s1: Tensor, u7: Tensor) -> Tensor:
        """`[N, 4], [N, 4] -> [N, 4]`."""
        return self.s2(s1) * u7


def test_names_that_look_like_symbols_stay() -> None:
    axes = {0: Dim("n", max=64)}
    text = capture(Scaled(), (randn(2, 4), randn(2, 4)), dynamic_shapes=(axes, axes)).to_text()
    assert "%s1 : f32[s0, 4] = input\n  %u7 : f32[s0, 4] = input" in text
    assert "aten.linear(%s1, @s2.weight:f32[4, 4], @s2.bias:f32[4])  # s2; site s2, dense" in text


def test_one_line_a_node_and_every_site_marked(captured: Callable[[str], Program]) -> None:
    program = captured("vit")
    text = program.to_text()
    assert len(text.splitlines()) == 2 + sum(n.op != "get_attr" for n in program.graph.nodes)
    assert text.count("; site ") == len(program.sites())
