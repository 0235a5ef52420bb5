"""Where the command line gets a model from: a Hugging Face folder, or `package.module:factory`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ir.capture import capture
from ..ir.errors import CalibrationError, CaptureError, MissingExtraError
from ..ir.program import Program
from .attached_files import MODULES


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model with what is needed to capture it."""

    model: nn.Module
    example_inputs: Any
    dynamic_shapes: Any = None
    calibration: Sequence[Any] = field(default_factory=tuple)
    tokenizer: Any = None

    def capture(self) -> Program:
        """The captured program."""
        return capture(self.model, self.example_inputs, dynamic_shapes=self.dynamic_shapes)

    def cast(self, dtype: torch.dtype) -> Source:
        """The same model, example inputs and calibration batches with their floats in `dtype`; the model itself is cast."""

        def cast(tree: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

        return replace(self, model=self.model.to(dtype), example_inputs=cast(self.example_inputs), calibration=cast(list(self.calibration)))

    def text_batches(self, path: Path, *, windows: int, length: int) -> list[dict[str, Tensor]]:
        """Calibration batches from a UTF-8 text file: evenly spaced token windows."""
        from .zoo import token_windows

        if self.tokenizer is None:
            raise CalibrationError(f"--calibration {path}: this source has no tokenizer; return calibration batches from a factory instead")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"--calibration {path}: {error}") from error
        ids = token_windows(self.tokenizer, [text], length=length, count=windows)
        return [text_inputs(w.unsqueeze(0)) for w in ids]


def text_inputs(ids: Tensor) -> dict[str, Tensor]:
    """Keyword inputs of a text model for `ids: [B, S] int64`, nothing masked."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def load_source(where: str) -> Source:
    """The model named on the command line."""
    if Path(where).is_dir():
        return _huggingface(Path(where))
    if ":" in where:
        return _factory(where)
    raise CaptureError(f"model {where!r}: expected a Hugging Face folder, or package.module:factory")


def _factory(where: str) -> Source:
    """Call the factory; it returns a Source, a dict of its fields, `(model, example_inputs)`, or a module with `example_inputs`."""
    module, _, name = where.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"model {where!r}: {error}; expected an importable package.module and a function in it that takes no arguments") from error
    finally:
        sys.path.pop(0)
    if isinstance(made, Source):
        return made
    if isinstance(made, dict):
        return Source(**made)
    if isinstance(made, tuple) and len(made) == 2:
        return Source(model=made[0], example_inputs=made[1])
    raise CaptureError(f"model {where!r}: the factory returned {type(made).__name__}; return (model, example_inputs) or a dict with model, example_inputs, ...")


def _huggingface(folder: Path) -> Source:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"loading {folder}") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CaptureError(f"model {folder}: not a Hugging Face folder ({error})") from error
    architecture = (config.architectures or [""])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise CaptureError(f"model {folder}: config.json names the architecture {architecture!r}, which transformers {transformers.__version__} does not have")
    try:
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        hint = "; it holds a compressed model: load it with fxpress.from_pretrained" if (folder / MODULES).exists() else ""
        raise CaptureError(f"model {folder}: its weights are missing or damaged ({error}){hint}") from error
    if model.main_input_name == "pixel_values":
        return _vision(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if any(folder.glob("tokenizer*")) else None
    return text_source(model, tokenizer)


def _vision(model: nn.Module) -> Source:
    config: Any = model.config
    size = getattr(config, "image_size", 224) or 224
    pixels = torch.zeros(2, getattr(config, "num_channels", 3), size, size)
    return Source(model=model, example_inputs={"pixel_values": pixels}, dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", max=1024)}})


def text_source(model: nn.Module, tokenizer: Any = None) -> Source:
    """A text model with dynamic batch and sequence axes; decoders are captured without their cache."""
    config: Any = model.config
    example: dict[str, Any] = text_inputs(torch.zeros(2, 16, dtype=torch.int64))
    longest = getattr(config, "max_position_embeddings", None) or 4096
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=longest)}
    shapes: dict[str, Any] = {"input_ids": axes, "attention_mask": axes}
    if hasattr(config, "use_cache"):
        example["use_cache"], shapes["use_cache"] = False, None
    return Source(model=model, example_inputs=example, dynamic_shapes=shapes, tokenizer=tokenizer)
