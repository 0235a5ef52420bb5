"""The Triton target (CUDA): Load as Sparse, Compute as Dense.

`lowering` turns a program's compressed linears into kernels, `layout` and `pack` lay weights out for them, `kernels/` holds the device code, `launch` runs it,
`operators` puts it into graphs, `sass` and `static` count what it costs without a GPU. Nothing here imports triton before a kernel is needed.
"""

from .layout import Tile
from .lowering import Triton

__all__ = ["Tile", "Triton"]
