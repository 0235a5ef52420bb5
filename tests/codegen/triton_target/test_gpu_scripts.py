"""The GPU benchmarks run from end to end: in the interpreter on tiny shapes, so that they are ready where a GPU is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

SCRIPTS = Path(__file__).parents[3] / "benchmarks"
FORMS = ("bitmap 50% float16", "bitmap 50% 4 bits", "balanced 16:32 float16", "balanced 16:32 4 bits", "2:4 float16", "4 bits")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU run the scripts themselves")
@pytest.mark.parametrize(
    ("script", "plain"),
    [("lscd_gpu.py", "cuBLAS float16"), pytest.param("lscd_decode_gpu.py", "dense float16 (cuBLAS)", marks=pytest.mark.slow)],  # the same kernels in a stack
)
def test_every_contestant_is_correct(script: str, plain: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), "--tiny"], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for contestant in (plain, *FORMS):
        lines = [line for line in done.stdout.splitlines() if f" {contestant} " in line]
        assert lines, f"{contestant} is missing in\n{done.stdout}"
        errors = [float(line.split("error ")[1].split()[0]) for line in lines if "error " in line]
        assert all(e < 2e-3 for e in errors)
