"""What must hold of a program at each stage, as data: a table of named rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from .errors import FormatError, SpecError, VerifyError
from .nodes import get_tensor, op_name
from .program import Program, Stage
from .sites import find_sites
from .weights import named_tensors

ALL = frozenset(Stage)


@dataclass(frozen=True)
class Rule:
    """An invariant; `check` yields one message per violation. While a `fatal` one is broken, the rules after it cannot be checked."""

    name: str
    stages: frozenset[Stage]
    check: Callable[[Program], Iterator[str]]
    fatal: bool = False


def _graph_is_well_formed(program: Program) -> Iterator[str]:
    try:
        program.graph.lint()
    except (RuntimeError, AttributeError) as error:
        yield str(error)


def _reads_are_bound(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            try:
                get_tensor(program.graph_module, str(node.target))
            except AttributeError as error:
                yield f"{node.name} reads {node.target}: {error}"


def _only_calls(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op in ("call_module", "call_method"):
            yield f"{node.name} is a {node.op}; only operator calls are allowed"


def _inputs_match(program: Program) -> Iterator[str]:
    count = sum(n.op == "placeholder" for n in program.graph.nodes)
    if count != len(program.inputs.leaves):
        yield f"{count} placeholders for {len(program.inputs.leaves)} example inputs"


def _payloads_fit(program: Program) -> Iterator[str]:
    try:
        sites = find_sites(program)
    except (FormatError, SpecError) as error:  # a node's format spec cannot be read
        yield str(error)
        return
    for site in (s for s in sites if s.compressed):
        try:
            site.format.check_payload(site.payload(), site.rows, site.columns, site.dtype, site.name)
        except (FormatError, ValueError) as error:
            yield str(error)


def _no_compressed_ops(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if op_name(node).startswith("fxpress."):
            yield f"{node.name} is {op_name(node)}, which does not belong to stage {program.stage.value}"


def _no_orphans(program: Program) -> Iterator[str]:
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    for name, _ in named_tensors(program.graph_module):
        if name not in used:
            yield f"tensor {name} is stored but no node reads it"


def _weights_are_finite(program: Program) -> Iterator[str]:
    for name, tensor in program.graph_module.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            yield f"weight {name} holds NaN or infinite values"


RULES = (
    Rule("every weight read is bound", ALL, _reads_are_bound, fatal=True),
    Rule("the graph is well formed", ALL, _graph_is_well_formed, fatal=True),
    Rule("only operator calls", ALL, _only_calls),
    Rule("one placeholder per input", ALL, _inputs_match),
    Rule("payloads fit their formats", frozenset({Stage.COMPRESSED}), _payloads_fit),
    Rule("no fxpress operators", frozenset({Stage.CAPTURED, Stage.LOWERED}), _no_compressed_ops),
    Rule("no orphan tensors", frozenset({Stage.COMPRESSED, Stage.LOWERED}), _no_orphans),
    Rule("weights are finite", ALL, _weights_are_finite),
)


def verify(program: Program) -> None:
    """Raise `VerifyError` that lists every broken rule of the program's stage (at most 5 violations a rule)."""
    problems: list[str] = []
    for rule in (r for r in RULES if program.stage in r.stages):
        found = list(islice(rule.check(program), 5))
        problems += [f"{rule.name}: {message}" for message in found]
        if found and rule.fatal:
            break
    if problems:
        raise VerifyError(f"program at stage {program.stage.value} is not valid:\n  " + "\n  ".join(problems))
