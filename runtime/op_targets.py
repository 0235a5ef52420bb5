"""Names of the functions a graph may call, and back: registered torch operators and a short list of scalar functions.

Reading a name runs no code of its author's: an operator is found only if its exact schema is registered with torch, everything else only in the table.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from ..ir import ops  # noqa: F401  (registers torch.ops.fxpress)
from ..ir.errors import ArtifactError

_SCALAR_FUNCTIONS = {
    operator: ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "lshift", "rshift",
               "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "invert"),
    math: ("ceil", "floor", "trunc", "sqrt", "pow", "log2"),
    torch: ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sqrt", "sym_sum", "sym_fresh_size", "_sym_sqrt", "_sym_log2"),
}  # fmt: skip
_BY_NAME: dict[str, Callable[..., Any]] = {
    f"{module.__name__}::{name}": getattr(module, name) for module, names in _SCALAR_FUNCTIONS.items() for name in names if hasattr(module, name)
} | {"builtins::round": round}
_BY_FUNCTION = {function: name for name, function in _BY_NAME.items()}
_OPERATOR = re.compile(r"([A-Za-z_]\w*)::(\w+)\.(\w+)", re.ASCII)


def target_name(target: Any, where: str) -> str:
    """`aten::linear.default`, `operator::mul`, ... of a `call_function` target; `ArtifactError` for anything without such a name."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    try:
        return _BY_FUNCTION[target]
    except (KeyError, TypeError):
        kind = "higher-order operator" if isinstance(target, torch._ops.HigherOrderOperator) else type(target).__name__
        raise ArtifactError(
            f"{where}: cannot save a call of the {kind} {target}; expected a registered torch operator. "
            "Export without control flow, or register the function with torch.library.custom_op"
        ) from None


def resolve_target(name: Any, where: str) -> Callable[..., Any]:
    """Inverse of `target_name`; unknown and unregistered names raise `ArtifactError`."""
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    match = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if match is None or not _is_registered(*match.groups()):
        raise ArtifactError(f"{where}: {str(name)[:80]!r} is no operator of this process; import the package that registers it first, or upgrade torch")
    namespace, short, overload = match.groups()
    return getattr(getattr(getattr(torch.ops, namespace), short), overload)


def _is_registered(namespace: str, short: str, overload: str) -> bool:
    schemas = torch._C._jit_get_schemas_for_operator(f"{namespace}::{short}")
    return any((schema.overload_name or "default") == overload for schema in schemas)
