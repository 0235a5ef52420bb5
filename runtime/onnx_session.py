"""Run exported models in ONNX Runtime as plain functions: language models from token ids to logits, others from one tensor to one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import MissingExtraError


class OnnxLanguageModel:
    """`model(input_ids: [B, S] int64) -> logits [B, S, V] f32` on the CPU; nothing is masked."""

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.session = open_session(path, threads=threads)
        self._inputs = [i.name for i in self.session.get_inputs()]

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits of every position."""
        feeds = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        (logits,) = self.session.run(["logits"], {name: feeds[name].numpy() for name in self._inputs})
        return torch.from_numpy(logits)


def tensor_function(path: str | Path, *, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A model with one input and one output as a function on CPU tensors."""
    session = open_session(path, threads=threads)
    (entry,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0])


def open_session(path: str | Path, *, threads: int | None = None, prepack: bool = True, spin: bool = True) -> Any:
    """An ONNX Runtime CPU session with all optimizations; without `prepack` it copies no weight out of a mapped data file.

    Without `spin` its threads sleep between operators: for several sessions in turn on the same cores, which would wait for each other.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "running an ONNX file") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
