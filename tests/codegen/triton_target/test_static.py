"""The static gate itself: every variant keeps its limits, and a broken limit is seen. Compiles in a process of its own, without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

triton = pytest.importorskip("triton")

from fxpress.codegen.triton_target.sass import LoopCost, matrix_loops
from fxpress.codegen.triton_target.static import ARCHITECTURES, LIMITS, VARIANTS, StaticRow, static_table
from fxpress.ir.errors import LowerError

MADE_WITH = yaml.safe_load(LIMITS.read_text(encoding="utf-8"))["triton"]
COST = LoopCost(instructions=6.0, shared=40.0, registers=96, spilled=0, copies=4, shared_bytes=30000)
ROW = StaticRow(variant="v", architecture=80, cost=COST, limits={"instructions": 6.1, "shared": 41.0, "registers": 96})


# One variant of every structure and every kind of values; the others differ in densities, dtypes and groups.
EVERY_KIND = (
    "bitmap 50 %, 4-bit codes",
    "balanced 16:32, row tables",
    "2:4, float16",
    "8-bit codes, bfloat16",
    "4-bit shared table, outliers",
)
COMMAND = """
from fxpress.codegen.triton_target import static
from fxpress.runtime.cli import main
static.static_table.__defaults__ = ({names}, {architectures})
main()
"""


@pytest.mark.skipif(triton.__version__ != MADE_WITH, reason=f"the limits were made with triton {MADE_WITH}")
@pytest.mark.parametrize(("names", "architectures"), [(EVERY_KIND, (90,)), pytest.param(tuple(VARIANTS), ARCHITECTURES, marks=pytest.mark.slow)])
def test_every_variant_keeps_its_limits(names: tuple[str, ...], architectures: tuple[int, ...]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "COLUMNS": "200"}
    command = [sys.executable, "-c", COMMAND.format(names=names, architectures=architectures), "bench", "kernels", "--static"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("│ ok") == len(names) * len(architectures)


def test_what_breaks_a_limit_is_named() -> None:
    assert ROW.faults == ()
    assert replace(ROW, limits={"instructions": 5.9}).faults == ("instructions 6 > 5.9",)
    assert replace(ROW, cost=replace(COST, spilled=8, copies=0)).faults == ("spills registers", "has no asynchronous copies")


def test_another_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "0.0")
    with pytest.raises(LowerError, match=r"made with triton .* and this is 0\.0"):
        next(static_table())


def test_loops_with_a_matrix_instruction_come_in_their_order() -> None:
    code = """
.L_x_0:
  /*0000*/ MOV R1, R2;
  /*0010*/ @P0 BRA `(.L_x_0);
.L_x_1:
  /*0020*/ LDS R1, [R2];
  /*0030*/ HMMA.16816.F32 R0, R1, R2, R0;
  /*0040*/ @!P1 BRA `(.L_x_1);
  /*0050*/ EXIT;
"""
    assert matrix_loops(code) == [["LDS R1, [R2]", "HMMA.16816.F32 R0, R1, R2, R0", "@!P1 BRA `(.L_x_1)"]]
    with pytest.raises(LowerError, match="no loop"):
        matrix_loops("/*0000*/ EXIT;")
