"""torch.onnx's translations, read once a session: it parses the source of all 500 anew at every export, which takes longer than a small export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

MODULE = "torch.onnx._internal.exporter._registration"


def remember() -> None:
    """From the second export on, hand out copies of the tables the first one made (nothing happens before torch.onnx is imported)."""
    registry = getattr(sys.modules.get(MODULE), "ONNXRegistry", None)
    if registry is not None and not hasattr(registry.from_torchlib, "original"):
        registry.from_torchlib = _copies(registry.from_torchlib)


def forget() -> None:
    """Back to what torch does."""
    registry = getattr(sys.modules.get(MODULE), "ONNXRegistry", None)
    if registry is not None and hasattr(registry.from_torchlib, "original"):
        registry.from_torchlib = registry.from_torchlib.original


def _copies(original: Callable[..., Any]) -> Callable[..., Any]:
    made = cache(original)

    def from_torchlib(**options: Any) -> Any:
        table = copy(made(**options))
        table.functions = {target: list(found) for target, found in table.functions.items()}  # an export adds its own translations
        return table

    from_torchlib.original = original  # type: ignore[attr-defined]
    return staticmethod(from_torchlib)
