"""fxpress: a compiler for model compression.

`optimize(model, passes)` captures a PyTorch model into an FX graph, rewrites it pass by pass, and returns a `Result` to inspect, export and run.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if not Path(__file__).with_name("ir").is_dir():  # a clone without symbolic links: the folders stand at the repository's root
    __path__.append(str(Path(__file__).parents[2]))

from .ir.capture import capture
from .ir.errors import FxpressError
from .ir.program import Program
from .passes.examples import Labelled
from .passes.recipe import Recipe
from .runtime.attached_files import from_pretrained, save_pretrained
from .runtime.causal_lm import capture_causal_lm
from .runtime.optimize import load, optimize
from .runtime.result import Result

try:
    __version__ = version("fxpress")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "FxpressError", "Labelled", "Program", "Recipe", "Result", "__version__", "capture", "capture_causal_lm", "from_pretrained", "load", "optimize",
    "save_pretrained",
]  # fmt: skip
