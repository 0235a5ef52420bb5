"""Healing chains of factors: towards the known optimum under the Gram, never worse, from calibration data alone; what is no chain is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxpress.ir.chain import Product
from fxpress.ir.edit import Editor
from fxpress.ir.errors import CalibrationError, TrainingError
from fxpress.ir.nodes import get_tensor
from fxpress.ir.program import Program
from fxpress.ir.weights import named_tensors
from fxpress.passes.base import Need
from fxpress.passes.calibrate import CalibrationWalk
from fxpress.passes.chain_healing import find_chains, heal_chains, matrix_of
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.spectra import spectrum
from fxpress.passes.tapped import Tapped
from fxpress.passes.trainable import Healing, find_parts
from fxpress.passes.training_options import TrainingOptions

from ..checks import assert_same
from .healing_nets import batch, compressed, context, tower
from .nets import conv_net

SITE = "layers.0.up"
LONG = TrainingOptions(steps=300)
SVD = f"factorize_svd{{ratio=0.5,metric=weight,only=[{SITE}]}}"


def heal(program: Program, ctx: Context, options: TrainingOptions = LONG) -> Healing:
    assert ctx.original is not None
    reasons = find_chains(program, find_parts(program)[0], ctx.original)[1]
    return heal_chains(program, [p for p in find_parts(program)[0] if p.node not in reasons], options, ctx)


def gram_at(original: Program, site: str, ctx: Context) -> Tensor:
    """The Gram of the site's inputs, float64."""
    (found,) = (s for s in original.sites() if s.name == site)
    gram = CalibrationWalk(original, ctx.calibration).statistics([found], Need.GRAM).gram
    assert gram is not None
    return gram[0].double()


def error(matrix: Tensor, target: Tensor, gram: Tensor) -> float:
    delta, target = matrix.double() - target.double(), target.double()
    return float(((delta @ gram * delta).sum() / (target @ gram * target).sum()).sqrt())


def test_a_pair_fitted_to_the_weight_reaches_the_optimum_under_the_gram() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, SVD)
    gram, weight = gram_at(original, SITE, ctx), get_tensor(original.graph_module, f"{SITE}.weight").detach()
    rank = get_tensor(student.graph_module, f"{SITE}.down.weight").shape[0]
    found = heal(student, ctx)
    optimum = spectrum(weight, gram).error(rank)
    start, end = (found.facts[f"{SITE}.down"][f"output_error_{w}"] for w in ("before", "after"))
    product = found.tensors[f"{SITE}.up.weight"].double() @ found.tensors[f"{SITE}.down.weight"].double()
    assert optimum < 0.95 * start and end == pytest.approx(optimum, rel=2e-3) and error(product, weight, gram) == pytest.approx(end, rel=1e-4)
    assert "1 of 1 weights got better" in found.notes[0]


def test_a_pair_that_is_optimal_stays() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, SVD.replace("metric=weight", "metric=input"))
    facts = heal(student, ctx).facts[f"{SITE}.down"]
    assert facts["output_error_after"] <= facts["output_error_before"] == pytest.approx(facts["output_error_after"], rel=1e-3)


def test_cores_fitted_to_the_weight_come_near_those_refined_under_the_gram() -> None:
    original, spec = tower(), f"factorize_mpo{{ratio=0.5,family=2,only=[{SITE}],refine=300}}"
    ctx, plain, refined = context(original), compressed(original, spec.replace("refine=300", "metric=weight")), compressed(original, spec)
    facts = heal(plain, ctx).facts[f"{SITE}.inner"]
    goal = heal(refined, ctx).facts[f"{SITE}.inner"]["output_error_after"]
    assert facts["output_error_after"] < 0.95 * facts["output_error_before"] and facts["output_error_after"] < 1.1 * goal


@pytest.mark.parametrize("spec", [SVD, f"factorize_mpo{{ratio=0.5,metric=weight,family=4,only=[{SITE}]}}"])
def test_the_matrix_is_that_of_the_graph(spec: str) -> None:
    original = tower()
    student = compressed(original, spec)
    ((chain,), reasons) = find_chains(student, find_parts(student)[0], original)
    assert {p.name.rpartition(".")[0] for p in chain.factors} == {SITE} and len(chain.factors) == 2
    assert all("no factor" in why for why in reasons.values())
    with torch.no_grad():
        x, y = Tapped(student, [chain.start.name, chain.end.name])(((batch(3),), {})).hidden
    torch.testing.assert_close(y - get_tensor(original.graph_module, f"{SITE}.bias").detach(), x @ matrix_of(student, chain, {}).t())


def test_later_chains_see_the_healed_ones_before_them() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, "factorize_svd{ratio=0.5,metric=weight,only=['layers.*']}")
    found = heal(student, ctx, TrainingOptions(steps=20))
    alone = heal_chains(student, [p for p in find_parts(student)[0] if p.name.startswith("layers.2.down.")], TrainingOptions(steps=20), ctx)
    assert len(found.facts) == 12 and len(alone.facts) == 2
    assert found.facts["layers.2.down.up"]["output_error_before"] != alone.facts["layers.2.down.up"]["output_error_before"]
    assert all(f["output_error_after"] <= f["output_error_before"] for f in found.facts.values())


def test_zeros_of_pruned_factors_stay_and_a_frozen_factor_too() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, SVD, f"prune_magnitude{{sparsity=0.3,only=['{SITE}.*']}}")
    found = heal(student, ctx)
    for name, tensor in found.tensors.items():
        zeros = get_tensor(student.graph_module, name) == 0
        assert bool(zeros.any()) and bool((tensor[zeros] == 0).all())
    one = heal_chains(student, [p for p in find_parts(student)[0] if p.name == f"{SITE}.up"], LONG, ctx)
    assert list(one.tensors) == [f"{SITE}.up.weight"]


def test_one_factor_alone_is_the_least_squares_solution() -> None:
    original = tower()
    ctx, student = context(original), compressed(original, SVD)
    gram, weight = gram_at(original, SITE, ctx), get_tensor(original.graph_module, f"{SITE}.weight").detach().double()
    down = get_tensor(student.graph_module, f"{SITE}.down.weight").detach().double()
    found = heal_chains(student, [p for p in find_parts(student)[0] if p.name == f"{SITE}.up"], LONG, ctx)
    optimum = torch.linalg.solve(down @ gram @ down.t(), down @ gram @ weight.t()).t()
    assert error(found.tensors[f"{SITE}.up.weight"].double() @ down, weight, gram) == pytest.approx(error(optimum @ down, weight, gram), rel=1e-4)


def test_a_killed_run_resumes_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpress.passes import chain_healing

    original = tower()
    student, options = compressed(original, "factorize_svd{ratio=0.5,metric=weight,only=['layers.*']}"), TrainingOptions(steps=10)
    want, refit, left = heal(student, context(original), options), chain_healing._refit, [4]

    def counted(*arguments: object) -> dict[str, Tensor]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return refit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(chain_healing, "_refit", counted)
    ctx = context(original, checkpoint=Checkpoint(tmp_path, "x"))
    with pytest.raises(KeyboardInterrupt):
        heal(student, ctx, options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    left[0] = 4
    got = heal(student, ctx, options)  # three more
    assert_same(dict(got.tensors), dict(want.tensors))
    assert (got.facts, got.notes) == (want.facts, want.notes)


def test_neither_program_is_changed() -> None:
    original = tower()
    student = compressed(original, SVD)
    before = [{n: t.detach().clone() for n, t in named_tensors(p.graph_module)} for p in (original, student)]
    heal(student, context(original))
    assert_same([{n: t.detach() for n, t in named_tensors(p.graph_module)} for p in (original, student)], before)


def test_refusals() -> None:
    original = tower()
    student = compressed(original, SVD)
    parts = find_parts(student)[0]
    with pytest.raises(TrainingError, match="needs the original program"):
        heal_chains(student, parts, LONG, Context())
    with pytest.raises(CalibrationError, match="needs calibration data"):
        heal_chains(student, parts, LONG, Context(original=original))
    (down, up) = (p for p in parts if p.name.startswith(f"{SITE}."))
    bent = student.clone()
    nodes = {n.name: n for n in bent.graph.nodes}
    with bent.graph.inserting_after(nodes[down.node.name]):
        relu = bent.graph.call_function(torch.ops.aten.relu.default, (nodes[down.node.name],))
    nodes[up.node.name].replace_input_with(nodes[down.node.name], relu)
    chains, reasons = find_chains(bent, find_parts(bent)[0], original)
    assert not chains and any("stands relu_default (aten.relu), which is no product" in why for why in reasons.values())


def test_factors_of_convolutions_are_left_to_other_scopes() -> None:
    program, ctx = conv_net()
    student = program.clone()
    (site,) = (s for s in student.sites() if s.name == "hidden")
    with Editor(student, "test") as editor:
        editor.factorize(site, (Product(name="a", weight=torch.randn(4, site.columns)), Product(name="b", weight=torch.randn(site.rows, 4))), "why")
    chains, _ = find_chains(student, find_parts(student)[0], program)
    assert [c.site.name for c in chains] == ["hidden"]
    renamed = [replace(p, name="conv.first") if p.name == "conv" else p for p in find_parts(student)[0]]
    assert "its chain stands for a conv2d" in find_chains(student, renamed, program)[1][renamed[0].node]
    assert ctx.calibration
