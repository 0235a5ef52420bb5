"""Every rule fires on a program that breaks it, and on no sound one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxpress.ir.edit import Editor
from fxpress.ir.errors import VerifyError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.inputs import Inputs
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program, Stage
from fxpress.ir.verify import RULES
from fxpress.ir.weights import delete_tensor, set_tensor

from ..tiny import randn


def compressed(program: Program) -> Program:
    site, fmt = program.sites()[0], Affine(bits=4)
    with Editor(program, "test") as editor:
        editor.compress(site, fmt, fmt.encode(site.matrix()), "test")
    return program


def unknown_argument(program: Program) -> None:
    nodes = {n.name: n for n in program.graph.nodes}
    nodes["relu"].args = (next(iter(Program.clone(program).graph.nodes)),)


def unbound(program: Program) -> None:
    delete_tensor(program.graph_module, program.sites()[0].tensors[0])


def method_call(program: Program) -> None:
    output = next(n for n in program.graph.nodes if n.op == "output")
    with program.graph.inserting_before(output):
        program.graph.call_method("relu", (next(n for n in program.graph.nodes if n.name == "relu"),))


def extra_input(program: Program) -> None:
    program.inputs = Inputs((randn(4, 12), randn(1)), {})


def wrong_payload(program: Program) -> None:
    name = program.sites()[0].tensors[0]
    set_tensor(program.graph_module, name, get_tensor(program.graph_module, name)[:, :-1].clone(), parameter=False)


def unknown_format(program: Program) -> None:
    node = program.sites()[0].node
    node.args = (*node.args[:3], "nothing{bits=4}", *node.args[4:])


def early_stage(program: Program) -> None:
    program.stage = Stage.CAPTURED


def orphan(program: Program) -> None:
    set_tensor(program.graph_module, "orphan", torch.zeros(1), parameter=False)


def infinite(program: Program) -> None:
    name = program.sites()[1].tensors[0]
    broken = get_tensor(program.graph_module, name).detach().clone()
    broken[0, 0] = float("inf")
    set_tensor(program.graph_module, name, broken, parameter=True)


BREAKS = {
    "the graph is well formed": (unknown_argument, ""),
    "every weight read is bound": (unbound, "reads up.weight_codes"),
    "only operator calls": (method_call, "is a call_method"),
    "one placeholder per input": (extra_input, "1 placeholders for 2 example inputs"),
    "payloads fit their formats": (wrong_payload, r"payload of affine\{bits=4\} at up \(weight \[20, 12\]\)"),
    "no fxpress operators": (early_stage, "is fxpress.linear, which does not belong to stage captured"),
    "no orphan tensors": (orphan, "tensor orphan is stored but no node reads it"),
    "weights are finite": (infinite, "weight down.weight holds NaN or infinite values"),
}


def test_every_rule_has_a_program_that_breaks_it() -> None:
    assert {r.name for r in RULES} == set(BREAKS)


@pytest.mark.parametrize("rule", BREAKS)
def test_rule_fires(rule: str, captured: Callable[[str], Program]) -> None:
    program = compressed(captured("mlp"))
    program.verify()
    damage, message = BREAKS[rule]
    damage(program)
    with pytest.raises(VerifyError, match=f"{rule}: .*{message}"):
        program.verify()


def test_unknown_format_is_reported_not_thrown(captured: Callable[[str], Program]) -> None:
    program = compressed(captured("mlp"))
    unknown_format(program)
    with pytest.raises(VerifyError, match="unknown weight format 'nothing'"):
        program.verify()


def test_message_lists_all_broken_rules(captured: Callable[[str], Program]) -> None:
    program = compressed(captured("mlp"))
    infinite(program)
    orphan(program)
    with pytest.raises(VerifyError, match=r"(?s)stage compressed is not valid.*orphan.*finite"):
        program.verify()
