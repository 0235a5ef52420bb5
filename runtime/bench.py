"""`fxpress bench`: tables of what kernels cost."""

from __future__ import annotations

import importlib.util

from rich.console import Console
from rich.table import Table

from ..ir.errors import MissingExtraError
from ..passes.progress import track


def run_static() -> bool:
    """Print the static table of the Triton kernels; returns whether every variant keeps its limits."""
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError("triton", "triton", "compiling the kernels")
    from ..codegen.triton_target.static import ARCHITECTURES, VARIANTS, static_table

    table = Table(
        "kernel variant", "GPU", "instructions a weight", "shared, 32 weights", "registers", "copies", "verdict", title="64 x 128 tiles, 16 tokens, 4 warps"
    )
    good = True
    for row in track(static_table(), "compiling", total=len(VARIANTS) * len(ARCHITECTURES)):
        cost, good = row.cost, good and not row.faults
        counts = (f"{cost.instructions:.2f}", f"{cost.shared:.1f}", str(cost.registers), str(cost.copies))
        table.add_row(row.variant, f"sm_{row.architecture}", *counts, "; ".join(row.faults) or "ok")
    Console().print(table)
    return good
