"""What a fast path of this target is: one weight format written as ONNX operators on low-bit initializers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...ir.nodes import argument
from ...ir.sites import WeightSite
from ..target import Support

if TYPE_CHECKING:
    import onnx_ir

    from .writer import Writer


LOWEST_OPSET = 21


@dataclass(frozen=True)
class Slot:
    """The place in the ONNX graph that a compressed site takes.

    `x` is its data (ids for an embedding), `bias` its bias if any, `consumers` read its output, `tied` are the other sites with the same payload.
    """

    site: WeightSite
    x: onnx_ir.Value
    bias: onnx_ir.Value | None
    consumers: tuple[onnx_ir.Node, ...]
    tied: tuple[WeightSite, ...]
    writer: Writer

    def option(self, name: str) -> Any:
        """An argument of the site's fxpress operator (`stride`, `padding`, ...)."""
        return argument(self.site.node, name)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What was written for a site: its output value, the operators used, and why these. `fused`: ONNX Runtime is expected to fuse them to MatMulNBits."""

    output: onnx_ir.Value
    text: str
    why: str
    fused: bool = False


class OnnxPath(ABC):
    """Base of the fast paths `codegen/onnx_target/<format>.py`."""

    @abstractmethod
    def supports(self, site: WeightSite) -> Support:
        """Whether the site can be written from its stored form."""

    def opset(self, site: WeightSite) -> int:
        """Lowest opset that holds the site in its smallest form."""
        return LOWEST_OPSET

    @abstractmethod
    def emit(self, slot: Slot) -> Form:
        """Write the site's operators and initializers."""

    def rows(self, slot: Slot, ids: onnx_ir.Value | None) -> onnx_ir.Value | None:
        """The weight decoded from its stored form, in the site's dtype: all of it `[N, K]`, or its rows `[..., K]` at `ids`. None: there is no such form."""
        return None
