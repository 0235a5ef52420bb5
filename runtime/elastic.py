"""One nested model, loaded once, run at any width: every width is a graph of its own over views of the same weights, and no weight is copied.

MatFormer (arXiv 2310.07707) switches width by a global factor; here a width belongs to the call, so that threads may use different ones.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.axes import analyze_axes
from ..ir.errors import PassError
from ..ir.program import Program
from ..ir.structure import Role, find_structure
from ..passes.slice import Slice, nested_sites, prefix_view
from ..passes.structured.groups import find_groups

if TYPE_CHECKING:
    from .elastic_onnx import ElasticExport

Width = float | int | Sequence[int]


class Elastic:
    """`elastic(..., width=0.5)` runs the first half of the units of every feed-forward layer of a program that `nest` has ordered.

    A width is a share of every layer, one number of units for all layers, or one for each in the order of the graph. `heads` is a share of the key-value
    groups (heads). Where a layer's inputs are centred, the missing units count by their mean, at every width.
    """

    def __init__(self, program: Program, *, multiple_of: int = 8) -> None:
        """Raises `PassError` for a program that is not nested."""
        if not nested_sites(program):
            raise PassError("Elastic: the program's units are in no order of importance; run the pass nest first")
        self.program, self.multiple_of = program, multiple_of
        self._views: dict[tuple[Any, ...], Program] = {}
        self._lock = threading.Lock()

    def at(self, width: Width = 1.0, heads: float = 1.0) -> Program:
        """The program at a width, made once; its tensors are the full program's, or prefixes of them."""
        key = (tuple(width) if isinstance(width, Sequence) else (type(width), width), heads)
        with self._lock:
            if key not in self._views:
                self._views[key] = prefix_view(self.program, self._slice(width, heads))
            return self._views[key]

    def __call__(self, *args: Any, width: Width = 1.0, heads: float = 1.0, **kwargs: Any) -> Any:
        """Run at a width; inputs as the program takes them."""
        return self.at(width, heads).run(*args, **kwargs)

    def widths(self) -> dict[str, int]:
        """Feed-forward layers by name with the number of their units."""
        structure = find_structure(self.program, analyze_axes(self.program, prefixes=True))
        return {g.name: g.size for g in find_groups(self.program, structure, (Role.FFN,))}

    def export_onnx(self, folder: str | Path, widths: Sequence[Width] = (1.0, 0.5, 0.25), *, opset: int | None = None) -> ElasticExport:
        """One checked ONNX graph a width (the widest first) over one file of weights; `ElasticSession` runs them."""
        from .elastic_onnx import export_elastic

        return export_elastic(self, folder, widths, opset=opset)

    def _slice(self, width: Width, heads: float) -> Slice:
        asked = None if heads == 1.0 else heads
        if isinstance(width, float):
            return Slice(ratio=width, heads=asked, multiple_of=self.multiple_of, allow_empty=True)
        widths = (width,) if isinstance(width, int) else tuple(width)
        return Slice(widths=widths, heads=asked, multiple_of=self.multiple_of, allow_empty=True)
