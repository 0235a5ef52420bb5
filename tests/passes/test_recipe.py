"""Recipes in YAML and Python resolve to the same passes; unknown keys are refused; specs round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fxpress.ir.errors import SpecError
from fxpress.passes.base import parse_pass
from fxpress.passes.recipe import as_recipe, load_recipe

TEXT = """
passes:
  - prune_wanda: {sparsity: 0.5, skip: [lm_head]}
  - quantize_gptq{bits=4,group_size=64}
  - fold_affine
  - quantize_rtn: {bits: 8, kinds: [embedding]}
seed: 3
"""


def test_yaml_and_python_agree(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    recipe = load_recipe(path)
    assert recipe.specs == (
        "prune_wanda{skip=[lm_head],sparsity=0.5}", "quantize_gptq{bits=4,group_size=64}", "fold_affine", "quantize_rtn{bits=8,kinds=[embedding]}",
    )  # fmt: skip
    assert as_recipe(recipe.specs).passes == recipe.passes
    assert as_recipe(str(path)) == recipe and recipe.seed == 3


def test_the_resolved_recipe_round_trips_with_every_option_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    resolved = load_recipe(path).to_yaml()
    assert "damping" in resolved
    (tmp_path / "again.yaml").write_text(resolved)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"passes": ["fold_affine"], "sed": 1}, "unknown key 'sed' .did you mean 'seed'"),
        ({"passes": "fold_affine"}, "must be a list"),
        ({"passes": [{"fold_affine": {"x": 1}}]}, "unknown option 'x'"),
        ({"passes": [3]}, "expected a pass object"),
        ({"passes": ["fold_affine"], "seed": "one"}, "must be an integer"),
        ([1], "expected a mapping"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, data: object, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError, match=message):
        load_recipe(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"recipe .*none\.yaml"):
        as_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("spec", ["prune_wanda{pattern=2:4}", "quantize_rtn{only=['re:a{2}, b'],bits=4}", "quantize_gptq{bits=3,damping=0.05,act_order=false}"])
def test_specs_round_trip(spec: str) -> None:
    assert parse_pass(parse_pass(spec).to_spec()) == parse_pass(spec)
