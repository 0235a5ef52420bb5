"""The reference target computes exactly what the compressed program computes, with plain operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxpress.codegen.reference import Reference
from fxpress.codegen.target import No, Yes
from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.formats.affine import Affine
from fxpress.ir.program import Program, Stage
from fxpress.ir.site_calls import why_not_compressible
from tests.checks import assert_same, compress


def compressed(program: Program, fmt: Affine) -> Program:
    with Editor(program, "test") as editor:
        for site in program.sites():
            if why_not_compressible(site) is None:
                editor.compress(site, fmt, fmt.encode(site.matrix()), "why")
    return program


@pytest.mark.parametrize("name", ["mlp", "conv", "depthwise", "conv1d", "repeated", "embedding", "gpt2"])
def test_lowered_equals_compressed(captured: Callable[[str], Program], name: str) -> None:
    program = compressed(captured(name), Affine(bits=3))
    before = program.to_text()
    lowered = Reference().lower(program)
    assert_same(lowered.artifact.run_examples(), program.run_examples())
    assert lowered.artifact.stage is Stage.LOWERED
    lowered.artifact.verify()
    assert "fxpress." not in lowered.artifact.to_text()
    assert program.to_text() == before, "lowering must leave the compressed program as it was"


def test_the_report_says_what_was_decoded(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    compress(program, program.sites()[0], Affine(bits=4))
    report = Reference().lower(program).report
    up, down = report.sites
    assert (up.site, up.format, up.form, up.why) == ("up", "affine{bits=4}", "aten.linear", "decoded once")
    assert (down.format, down.why) == ("dense", "not compressed")
    assert report.nbytes == captured("mlp").nbytes
    assert isinstance(Reference().supports(program.sites()[0]), No)
    assert isinstance(Reference().supports(program.sites()[1]), Yes)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_tied_sites_leaves_the_other_alone(captured: Callable[[str], Program], which: int) -> None:
    program = captured("embedding")
    embed, head = (s for s in program.sites() if s.tied)
    compress(program, (embed, head)[which], Affine(bits=2))
    assert_same(Reference().lower(program).artifact.run_examples(), program.run_examples())


def test_a_shared_payload_is_decoded_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    program = capture(nn.Sequential(layer, nn.Tanh(), layer).eval(), (torch.randn(2, 16),))
    fmt = Affine(bits=4)
    payload = fmt.encode(program.sites()[0].matrix())
    with Editor(program, "test") as editor:
        for site in program.sites():
            editor.compress(site, fmt, payload, "why")
    lowered = Reference().lower(program).artifact
    assert lowered.nbytes == 16 * 16 * 4
    assert_same(lowered.run_examples(), program.run_examples())
