"""Recipes: a list of passes and a seed, in Python or YAML with the same schema.

```yaml
passes:
  - prune_wanda: {sparsity: 0.5}
  - quantize_gptq{bits=4,group_size=64}
seed: 0
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..ir.errors import SpecError
from ..ir.spec import suggest
from .base import Pass, parse_pass

KEYS = ("passes", "seed")


@dataclass(frozen=True)
class Recipe:
    """Resolved passes in order, and the seed (None: the caller's)."""

    passes: tuple[Pass, ...]
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every option spelled out, so that later changes of defaults do not change it."""
        return {"passes": [{p.name: p.to_dict()} for p in self.passes], "seed": self.seed}

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def specs(self) -> tuple[str, ...]:
        """Short text specs of the passes."""
        return tuple(p.to_spec() for p in self.passes)


def as_recipe(passes: Recipe | Path | str | Pass | Mapping[str, Any] | Sequence[Any]) -> Recipe:
    """A recipe from pass objects, specs, a mapping with `passes`, or the path of a YAML file."""
    if isinstance(passes, Recipe):
        return passes
    if isinstance(passes, Path) or (isinstance(passes, str) and passes.endswith((".yaml", ".yml"))):
        return load_recipe(Path(passes))
    if isinstance(passes, Mapping) and "passes" in passes:
        return _from_mapping(passes, "recipe")
    items = [passes] if isinstance(passes, (str, Pass, Mapping)) else passes
    return Recipe(tuple(parse_pass(p) for p in items))


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; unknown keys are refused."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"recipe {path}: {error}") from error
    if not isinstance(data, Mapping):
        raise SpecError(f"recipe {path}: expected a mapping with the key 'passes', got {type(data).__name__}")
    return _from_mapping(data, f"recipe {path}")


def _from_mapping(data: Mapping[str, Any], where: str) -> Recipe:
    for key in data:
        if key not in KEYS:
            raise SpecError(f"{where}: unknown key {key!r}{suggest(str(key), KEYS)}; keys are {', '.join(KEYS)}")
    items, seed = data.get("passes"), data.get("seed")
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise SpecError(f"{where}: 'passes' must be a list, got {items!r}")
    if seed is not None and not isinstance(seed, int):
        raise SpecError(f"{where}: 'seed' must be an integer, got {seed!r}")
    return Recipe(tuple(parse_pass(i) for i in items), seed)
