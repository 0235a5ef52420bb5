"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before they are imported."""

from __future__ import annotations

import os

import torch

os.environ["FXPRESS_TUNE"] = "0"  # on a GPU the tests must not write schedules into the user's cache
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
