"""Removing indices of an axis class against zeroing them in every parameter, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxpress.ir.axes import AxisAnalysis, AxisClass, analyze_axes, labels
from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.nodes import get_tensor, op_name
from fxpress.ir.program import Program
from fxpress.ir.shapes import propagate
from fxpress.ir.weights import alias_classes, set_tensor

from .tiny import randn, seeded

TOLERANCE = 1e-9


def double(program: Program, *, spread: float = 0.3) -> Program:
    """A clone that computes in double precision; vectors (biases, norm weights, layer scales) are moved, so that none is trivially zero, one or tiny."""
    program = program.clone()
    generator = seeded(3)
    for node in program.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _widened)
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point():
            with value.fake_mode:  # type: ignore[attr-defined]
                node.meta["val"] = value.double()
    for names in alias_classes(program.graph_module).groups:
        tensor = get_tensor(program.graph_module, names[0])
        if tensor.is_floating_point():
            wide = tensor.detach().double()
            if isinstance(tensor, nn.Parameter) and wide.dim() == 1:
                wide = wide + spread * torch.randn(wide.shape, generator=generator)
            for name in names:
                set_tensor(program.graph_module, name, wide, parameter=isinstance(tensor, nn.Parameter))
    program.graph_module.recompile()
    program.inputs = type(program.inputs)(doubled(program.inputs.args), doubled(program.inputs.kwargs), program.inputs.dynamic)
    propagate(program)
    return program


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def doubled(tree: Any) -> Any:
    """The tree with floating-point tensors in double precision."""
    return pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def outputs(program: Program, call: Any = None) -> list[Tensor]:
    """The tensors that the program returns, on the example inputs or a call `(args, kwargs)`."""
    result = program.run_examples() if call is None else program.run_inputs(doubled(call))
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of the outputs, each relative to its largest value; infinite for other shapes and for NaN."""
    assert len(got) == len(wanted)
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or not torch.isfinite(a).all() or not torch.isfinite(b).all():
            return float("inf")
        worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)) if a.numel() else 0.0)
    return worst


def resized(program: Program, kept: Mapping[str, Iterable[int]]) -> Program:
    """A clone that keeps only the given indices of the classes of those names."""
    result = program.clone()
    analysis = analyze_axes(result)
    with Editor(result, "test") as editor:
        editor.resize_axis(analysis, {analysis.class_named(n): torch.tensor(list(k), dtype=torch.int64) for n, k in kept.items()}, "why")
    return result


def masked(program: Program, name: str, dropped: Tensor) -> Program:
    """A clone in which the dropped indices of a class are zero in every parameter and buffer that holds them."""
    result = program.clone()
    analysis = analyze_axes(result)
    one = analysis.class_named(name)
    with Editor(result, "test") as editor:
        for tensor, dim, axis in analysis.holders(one):
            value = get_tensor(result.graph_module, tensor).detach().clone()
            editor.set_tensor(tensor, value.index_fill_(dim, torch.isin(labels(axis, one.atom), dropped).nonzero().flatten(), 0))
    return result


def masked_outputs(analysis: AxisAnalysis, one: AxisClass, dropped: Tensor, call: Any = None) -> list[Tensor]:
    """`outputs` of the analyzed program with the dropped indices of a class zero, as in `masked`, without a clone."""
    module, given = analysis.program.graph_module, dict[str, Tensor]()
    aliases = alias_classes(module)
    for tensor, dim, axis in analysis.holders(one):
        value = given.get(tensor, get_tensor(module, tensor).detach())
        value = value.index_fill(dim, torch.isin(labels(axis, one.atom), dropped).nonzero().flatten(), 0)
        given |= dict.fromkeys(aliases.of(tensor), value)
    inputs = analysis.program.inputs
    args, kwargs = (inputs.args, inputs.kwargs) if call is None else doubled(call)
    with torch.no_grad():
        result = torch.func.functional_call(module, given, tuple(args), dict(kwargs), tie_weights=False)
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def divided(one: AxisClass, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Kept and dropped indices of a class: a third goes, in random places."""
    order = torch.randperm(one.size, generator=seeded(seed))
    count = max(1, one.size // 3)
    return order[count:].sort().values, order[:count]


def free(analysis: AxisAnalysis) -> list[AxisClass]:
    """Classes from which something can be removed."""
    return [c for c in analysis.classes if not c.pinned and c.size > 1]


def assert_removal_is_masking(program: Program, call: Any = None) -> list[str]:
    """Remove from every free class in turn and compare with masking it, if no `reductions` say otherwise. Returns the names of those compared."""
    analysis = analyze_axes(program)
    compared = []
    for one in free(analysis):
        keep, drop = divided(one)
        small = resized(program, {one.name: keep.tolist()})
        assert small.parameters == analysis.parameters({one.atom: keep}), one
        got = outputs(small, call)
        if not one.reductions:
            error = difference(got, masked_outputs(analysis, one, drop, call))
            assert error < TOLERANCE, f"{one}: removal and masking differ by {error:.3g}"
            compared.append(one.name)
    return compared


class Sandwich(nn.Module):
    """`last(middle(first(x)))`: what an operator in the middle does to the classes on both sides."""

    def __init__(self, first: nn.Module, middle: Callable[[Tensor], Tensor], last: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = first, middle, last

    def forward(self, x: Tensor) -> Tensor:
        """`last(middle(first(x)))`."""
        return self.last(self.middle(self.first(x)))


def between_linears(middle: Callable[[Tensor], Tensor], hidden: int = 12, out: int = 12) -> Program:
    """`[2, 3, 6]` -> linear to `hidden` -> `middle` -> linear from `out` to 4."""
    return sandwich(nn.Linear(6, hidden), middle, nn.Linear(out, 4), randn(2, 3, 6))


def between_convs(middle: Callable[[Tensor], Tensor], hidden: int = 8, out: int = 8) -> Program:
    """`[2, 3, 6, 6]` -> conv to `hidden` -> `middle` -> conv from `out` to 4."""
    return sandwich(nn.Conv2d(3, hidden, 3, padding=1), middle, nn.Conv2d(out, 4, 1), randn(2, 3, 6, 6))


def sandwich(first: nn.Module, middle: Callable[[Tensor], Tensor], last: nn.Module, x: Tensor) -> Program:
    """The captured sandwich in double precision, its weights drawn from one seed."""
    return captured_double(Sandwich(first, middle, last), x)


def captured_double(model: nn.Module, *inputs: Tensor) -> Program:
    """The model with random weights, captured, in double precision."""
    generator = seeded(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return double(capture(model, inputs))


def names_of_ops(program: Program) -> set[str]:
    """Operator names of the graph, with and without their overloads."""
    names = {op_name(n) for n in program.graph.nodes if n.op == "call_function"}
    return names | {".".join(n.split(".")[:2]) for n in names}


def summary(program: Program) -> str:
    """The free classes by name, those that something reduces over with a `~`; then the operators without a rule."""
    analysis = analyze_axes(program)
    found = [c.name + ("~" if c.reductions else "") for c in free(analysis)]
    return " ".join(found + [f"!{op_name(n)}" for n, _ in analysis.unruled])


def assert_case(program: Program, name: str, expected: str) -> None:
    """The operator called `name` is in the program, the free classes are the expected ones, and removal equals masking for them."""
    assert name in names_of_ops(program), sorted(names_of_ops(program))
    assert summary(program) == expected
    compared = assert_removal_is_masking(program)
    assert compared == [word for word in expected.split() if word[0] != "!" and word[-1] != "~"]
