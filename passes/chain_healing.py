"""Healing one factorized weight at a time: all factors of its chain are refitted to the original weight, under the Gram of what reaches them.

For a weight `W: [N, K]` of the original, the matrix `W'` that the chain stands for and the input Gram `C: [K, K]`, minimised is `tr((W - W') C (W - W')^T)`,
the squared error of the layer's outputs on the calibration data. `W'` is read off the graph: the chain is run on the identity, which L-BFGS differentiates.
The objective is that of data-aware factorization (SVD-LLM, arXiv 2403.07378); refitting a whole chain found in the graph is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import CalibrationError, TrainingError
from ..ir.nodes import get_tensor, op_name
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.weights import set_tensor
from .base import Need
from .calibrate import CalibrationWalk, Statistics
from .context import Context
from .factorizing import MATRICES
from .relative import relative_error
from .trainable import Healing, Part, readers, zero_mask
from .training_options import TrainingOptions

LINEAR = {
    "linear", "addmm", "mm", "matmul", "add", "unflatten", "flatten", "view", "reshape", "_unsafe_view", "transpose", "t", "permute", "slice",
    "constant_pad_nd", "clone", "contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class FactorChain:
    """What stands between `start`, the input of the original's `site`, and `end`, its output: `nodes` in graph order, and the factors among them."""

    site: WeightSite
    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    factors: tuple[Part, ...]


def find_chains(program: Program, parts: Sequence[Part], original: Program) -> tuple[list[FactorChain], dict[fx.Node, str]]:
    """The chains that hold `parts`, and by node of every other part the reason why it is no factor to heal."""
    sites = {s.name: s for s in original.sites()}
    nodes = {n.name: n for n in program.graph.nodes}
    members: dict[str, list[Part]] = {}
    reasons: dict[fx.Node, str] = {}
    for part in parts:
        owner = _owner(part, sites)
        if owner is None:
            reasons[part.node] = "is no factor of a weight of the original; scope=block and scope=model train it"
        elif sites[owner].kind not in MATRICES:
            reasons[part.node] = f"its chain stands for a {sites[owner].kind.value}, and only linears are refitted from their Gram; use scope=block"
        else:
            members.setdefault(owner, []).append(part)
    chains = []
    for owner, factors in members.items():
        found = _chain(program, sites[owner], nodes, factors)
        if isinstance(found, FactorChain):
            chains.append(found)
        else:
            reasons.update(dict.fromkeys((p.node for p in factors), found))
    return chains, reasons


def why_not_chains(program: Program, parts: Sequence[Part], original: Program | None) -> dict[fx.Node, str]:
    """By node of a part the reason why it is no factor to heal; without an original (a plan made ahead), nothing is known."""
    return {} if original is None else find_chains(program, parts, original)[1]


def _owner(part: Part, sites: Mapping[str, WeightSite]) -> str | None:
    """The original's site whose factor this is: the longest name in front of the part's."""
    if part.site is None or part.name in sites:
        return None
    pieces = part.name.split(".")
    return next((name for i in range(len(pieces) - 1, 0, -1) if (name := ".".join(pieces[:i])) in sites), None)


def _chain(program: Program, site: WeightSite, nodes: Mapping[str, fx.Node], factors: Sequence[Part]) -> FactorChain | str:
    """The nodes between the site's input and output, or why they are no chain."""
    start, end = nodes.get(site.data.name), nodes.get(site.node.name)
    if start is None or end is None:
        return f"{site.data.name if start is None else site.node.name}, which stood around {site.name}, is no longer in the graph; use scope=block"
    inside: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is start or node.op == "get_attr" or node in inside:
            continue
        if node.op != "call_function" or op_name(node).split(".")[1:2] == [] or op_name(node).split(".")[1] not in LINEAR:
            return f"between its factors stands {node.name} ({op_name(node)}), which is no product and no move; use scope=block"
        inside.add(node)
        waiting += node.all_input_nodes
    outside = [f"{p.name} stands elsewhere" for p in factors if p.node not in inside]
    outside += [f"{u.name} reads {p.name}" for p in factors for u in readers(program, p) if u not in inside]
    outside += [f"{u.name} reads {n.name}" for n in inside - {end} for u in n.users if u not in inside]
    if outside:
        return f"its chain is not alone: {outside[0]}; use scope=block"
    return FactorChain(site, start, end, tuple(n for n in program.graph.nodes if n in inside), tuple(factors))


def matrix_of(program: Program, chain: FactorChain, tensors: Mapping[str, Tensor]) -> Tensor:
    """`W': [N, K] float32`, differentiable in `tensors`, which stand in place of the program's own."""
    columns = chain.site.columns
    values: dict[fx.Node, Any] = {chain.start: torch.cat([torch.eye(columns), torch.zeros(1, columns)])}  # the last row: what the bias adds

    def load(node: fx.Node) -> Any:
        if node.op != "get_attr":
            return values[node]
        name = str(node.target)
        return tensors[name] if name in tensors else get_tensor(program.graph_module, name).detach().float()

    for node in chain.nodes:
        values[node] = node.target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))  # type: ignore[operator]
    made = values[chain.end]
    assert isinstance(made, Tensor)
    return (made[:-1] - made[-1:]).t()


def output_error(matrix: Tensor, target: Tensor, gram: Tensor) -> float:
    """`sqrt(tr((W - W') C (W - W')^T) / tr(W C W^T))`, in float64."""
    delta, whole, metric = (matrix - target).double(), target.double(), gram.double()
    power = float(((whole @ metric) * whole).sum())
    return relative_error(float(((delta @ metric) * delta).sum()), power)


class _Walk(CalibrationWalk):
    """A calibration walk that also gives the Gram of a value that is no site's data."""

    def gram(self, start: fx.Node, before: fx.Node) -> Tensor:
        """Mean of `x x^T` over the rows of `start`, `[K, K] f32`, after running everything before the node `before`."""
        self.run_before(before)
        statistics = Statistics()
        for values in self._values:
            statistics.add(values[start].reshape(1, -1, values[start].shape[-1]), Need.GRAM)
        statistics.finish()
        assert statistics.gram is not None
        return statistics.gram[0]


def heal_chains(program: Program, parts: Sequence[Part], options: TrainingOptions, ctx: Context, *, label: str = "recover") -> Healing:
    """Refit the chains that hold `parts` in graph order, later ones under what the healed earlier ones give them; the program is not changed."""
    calls = ctx.calibration or [e.call for e in ctx.training]
    if ctx.original is None:
        raise TrainingError("scope=local needs the original program, whose weights are the targets; run the pass in fxpress.optimize, or use scope=model")
    if not calls:
        raise CalibrationError("scope=local needs calibration data; pass calibration=[batch, ...] with batches shaped like example_inputs")
    student = program.clone()  # healed as the walk goes
    nodes = {n.name: n for n in student.graph.nodes}
    chains = find_chains(student, [replace(p, node=nodes[p.node.name]) for p in parts], ctx.original)[0]
    chains.sort(key=lambda c: list(nodes.values()).index(c.nodes[0]))
    walk, start, gram = _Walk(student, calls), None, torch.empty(0)
    tensors, facts = dict[str, Tensor](), dict[str, dict[str, float]]()
    for number, chain in enumerate(ctx.track(chains, label)):
        if chain.start is not start:
            start, gram = chain.start, walk.gram(chain.start, chain.nodes[0])
        name = f"stage-{ctx.stage:02d}-{label}-chain-{number:05d}"
        found, errors = _resumed(ctx, name, lambda chain=chain, gram=gram: _heal(student, chain, gram, options))  # type: ignore[misc]
        for tensor, value in found.items():
            set_tensor(student.graph_module, tensor, value, parameter=True)
        tensors |= found
        facts |= {p.name: errors for p in chain.factors}
    return _healing(tensors, facts, [facts[c.factors[0].name] for c in chains])


def _heal(student: Program, chain: FactorChain, gram: Tensor, options: TrainingOptions) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Better factors in the program's types, none if there are none; and the relative output error before and after."""
    target = chain.site.matrix().float()
    stored = {n: get_tensor(student.graph_module, n).detach() for p in chain.factors if p.site is not None for n in (p.site.tensors[0],) if n in p.tensors}
    with torch.no_grad():
        before = output_error(matrix_of(student, chain, {n: t.float() for n, t in stored.items()}), target, gram)
        refitted = _refit(student, chain, stored, (target, gram), options)
        found = {n: t.to(stored[n].dtype) for n, t in refitted.items()}
        after = output_error(matrix_of(student, chain, {n: t.float() for n, t in found.items()}), target, gram)
    better = after < before
    return found if better else {}, {"output_error_before": before, "output_error_after": after if better else before}


def _refit(student: Program, chain: FactorChain, stored: Mapping[str, Tensor], goal: tuple[Tensor, Tensor], options: TrainingOptions) -> dict[str, Tensor]:
    """L-BFGS in float32 on all factors of the chain at once; zeros of pruned factors stay."""
    (target, gram), masks = goal, {n: zero_mask(t) if options.keep_zeros else None for n, t in stored.items()}
    leaves = {n: t.float().clone(memory_format=torch.contiguous_format).requires_grad_() for n, t in stored.items()}
    power = float(((target @ gram) * target).sum().clamp_min(1e-30))
    optimizer = torch.optim.LBFGS(list(leaves.values()), max_iter=options.steps, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-9)

    def factors() -> dict[str, Tensor]:
        return {n: t if (mask := masks[n]) is None else t * mask for n, t in leaves.items()}

    def loss() -> float:
        optimizer.zero_grad()
        delta = matrix_of(student, chain, factors()) - target
        value = ((delta @ gram) * delta).sum() / power
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(loss)
    return {n: t.detach() for n, t in factors().items()}


def _resumed(ctx: Context, name: str, compute: Callable[[], tuple[dict[str, Tensor], dict[str, float]]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A chain as it was healed before a kill, else as `compute` heals it now, noted in the checkpoint."""
    if ctx.checkpoint is None:
        return compute()
    saved = ctx.checkpoint.read(name)
    if saved is not None:
        ctx.checkpoint.reused += 1
        return saved[1], dict(saved[0])
    tensors, errors = compute()
    ctx.checkpoint.write(name, {n: t.contiguous() for n, t in tensors.items()}, errors)
    return tensors, errors


def _healing(tensors: Mapping[str, Tensor], facts: Mapping[str, dict[str, float]], chains: Sequence[Mapping[str, float]]) -> Healing:
    why = {
        n: f"recover: refitted to the original weight, output error {f['output_error_before']:.4g} -> {f['output_error_after']:.4g}" for n, f in facts.items()
    }
    before, after = ([c[f"output_error_{when}"] for c in chains] for when in ("before", "after"))
    better = sum(a < b for a, b in zip(after, before, strict=True))
    mean = f"{sum(before) / len(before):.4g} -> {sum(after) / len(after):.4g}" if chains else ""
    return Healing(tensors, facts, why, (f"{better} of {len(chains)} weights got better; mean relative output error {mean}",))
