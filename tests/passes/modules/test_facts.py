"""Bases and scores against dense float64 computations of what they claim."""

from __future__ import annotations

import pytest
import torch

from fxpress.ir.edit import Editor
from fxpress.passes.context import Call, Context
from fxpress.passes.head_bases import change_scores
from fxpress.passes.modules.facts import Neurons, Pairs, Recipe, Values, maps_keys, module_facts, score_key
from fxpress.passes.modules.finding import Part, find_modules

from ... import attention_models
from ...tiny import randn

CALLS: list[Call] = [((randn(2, 5, 6, seed=i).double(), randn(2, 7, 32, seed=10 + i).double()), {}) for i in range(6)]
OURS = Recipe(neurons=Neurons.ELIMINATION, values=Values.STACKED, pairs=Pairs.SLOPES, ridge=0.01)


def test_mixed_scores_are_the_best_low_rank_scores() -> None:
    """The product of queries and centred keys, over independent tokens, loses exactly the squared singular values that are cut."""
    program = attention_models.program("cross")
    modules = find_modules(program, (Part.QUERY_KEY,)).modules
    facts = module_facts(program, modules, OURS, Context(calibration=CALLS))
    module = modules[0]
    first, second = (facts[k] for k in maps_keys(module))
    assert torch.allclose(first.transpose(1, 2) @ second, torch.eye(8, dtype=torch.float64).expand(4, 8, 8), atol=1e-6)
    assert bool((facts[score_key(module)].diff() <= 1e-12).all())
    with Editor(program, "test") as editor:
        change_scores(editor, module.heads, module.axis, first, second, "test")  # type: ignore[arg-type]
    again = module_facts(program, find_modules(program, (Part.QUERY_KEY,)).modules, OURS, Context(calibration=CALLS))
    for key in maps_keys(module):  # in the best basis the best basis is the identity, up to signs
        assert torch.allclose(again[key].abs(), torch.eye(8, dtype=torch.float64).expand(4, 8, 8), atol=1e-2)


@pytest.mark.parametrize("values", list(Values))
def test_maps_of_values_are_inverses(values: Values) -> None:
    program = attention_models.program("one_key_head")
    modules = find_modules(program, (Part.VALUE_OUTPUT,)).modules
    calls: list[Call] = [((randn(2, 5, 6, seed=i).double(),), {}) for i in range(6)]
    recipe = Recipe(neurons=Neurons.ELIMINATION, values=values, pairs=Pairs.SLOPES, ridge=0.01)
    facts = module_facts(program, modules, recipe, Context(calibration=calls))
    for module in modules:
        forward, back = (facts[k] for k in maps_keys(module))
        assert torch.allclose(forward @ back, torch.eye(8, dtype=torch.float64).expand_as(forward), atol=1e-8)


@pytest.mark.parametrize("neurons", [Neurons.GREEDY, Neurons.ELIMINATION])
def test_neurons_that_repeat_others_cost_nothing(neurons: Neurons) -> None:
    program = attention_models.program("cross")
    up = next(s for s in program.sites() if s.rows == 40)
    matrix = up.matrix().clone()
    matrix[20:] = matrix[:20]
    with Editor(program, "test") as editor:
        editor.set_matrix(up, matrix, "twins")
        editor.set_bias(up, torch.zeros(40, dtype=torch.float64), "twins")
    modules = find_modules(program, (Part.FEED_FORWARD,)).modules[:1]
    recipe = Recipe(neurons=neurons, values=Values.STACKED, pairs=Pairs.SLOPES, ridge=0.01)
    scores = module_facts(program, modules, recipe, Context(calibration=CALLS))[score_key(modules[0])].sort().values
    assert float(scores[:20].sum()) < 0.05 * float(scores.sum())
