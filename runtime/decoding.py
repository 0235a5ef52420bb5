"""Run a language model token by token: a program in torch, or its exported file in ONNX Runtime, whose caches stay where they are.

With attention as one operator (docs/onnx.md) the caches are buffers of the longest text, written in place; in portable files every call returns longer ones,
which the next call reads. Either way no cache passes through Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..codegen.onnx_target.cached_attention import CACHE_PROPERTY, IN_PLACE
from ..ir.errors import CalibrationError, LowerError
from ..ir.program import Program
from .causal_lm import CACHE
from .onnx_session import open_session

PAST, PRESENT = f"{CACHE}.", "present."


class Decoder(Protocol):
    """Logits `[B, n, V]` of new tokens `[B, n]` after those that are held; models of equal caches can go on from each other's."""

    @property
    def length(self) -> int:
        """Tokens of each text so far."""

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits of the new tokens, which are held from now on."""

    def start(self, rows: int = 1) -> None:
        """Forget what was given."""

    def rewind(self, length: int) -> None:
        """Hold the first `length` tokens alone."""

    def follow(self, other: Any) -> None:
        """Go on from what another decoder of this kind holds, without a copy."""


class ProgramDecoder:
    """`decoder(input_ids: [B, n]) -> logits [B, n, V]` of a program of `capture_causal_lm`, in torch."""

    def __init__(self, program: Program) -> None:
        if program.inputs.caches != (CACHE,):
            raise LowerError("ProgramDecoder: the program has no caches; capture the model with fxpress.capture_causal_lm")
        self.program = program
        self.start()

    @property
    def length(self) -> int:
        """Tokens of each text so far."""
        return 0 if self._held is None else int(self._held[0]["key"].shape[2])

    def start(self, rows: int = 1) -> None:
        """Forget what was given."""
        self._held: list[dict[str, Tensor]] | None = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits of the new tokens of texts without padding."""
        mask = input_ids.new_ones(len(input_ids), self.length + input_ids.shape[1])
        past = {} if self._held is None else {CACHE: self._held}
        with torch.no_grad():
            found = self.program.run(input_ids=input_ids, attention_mask=mask, **past)
        self._held = found["present"]
        logits: Tensor = found["logits"]
        return logits

    def rewind(self, length: int) -> None:
        """Hold the first `length` tokens alone."""
        _check_rewind(length, self.length)
        self._held = [{n: t[:, :, :length] for n, t in layer.items()} for layer in self._held] if self._held and length else None

    def follow(self, other: ProgramDecoder) -> None:
        """Go on from what another one holds; its caches are read, not copied."""
        self._held = other._held


def _check_rewind(length: int, held: int) -> None:
    if not 0 <= length <= held:
        raise CalibrationError(f"decoder: cannot rewind to {length} tokens, {held} are held")


class OnnxDecoder:
    """`decoder(input_ids: [B, n]) -> logits [B, n, V] f32` of new tokens after all that were given before; `start` begins anew.

    A file of `last_logits` gives those of the last new token alone, `[B, 1, V]`.

    Args:
        path: an ONNX file written from a program of `capture_causal_lm`.
        longest: most tokens of a text, prompt included.
        threads: of ONNX Runtime; as many as torch has if left out.
        spin: whether its threads wait awake; not for several decoders in turn, such as a draft and the full model.
    """

    def __init__(self, path: str | Path, *, longest: int, threads: int | None = None, spin: bool = True) -> None:
        self.session, self.longest = open_session(path, threads=threads, spin=spin), longest
        self._caches = {i.name.removeprefix(PAST): i for i in self.session.get_inputs() if i.name.startswith(PAST)}
        if not self._caches:
            raise LowerError(f"{path} has no caches; export a program of fxpress.capture_causal_lm")
        self._in_place = self.session.get_modelmeta().custom_metadata_map.get(CACHE_PROPERTY) == IN_PLACE
        self._last_only = next(o for o in self.session.get_outputs() if o.name == "logits").shape[1] == 1
        self._held: dict[str, Any] = {}
        self._mask = torch.zeros(0, 0, dtype=torch.int64)

    @property
    def length(self) -> int:
        """Tokens of each text so far."""
        return self._mask.shape[1]

    def start(self, rows: int = 1) -> None:
        """Forget what was given, and make room for `rows` texts."""
        room = self.longest if self._in_place else 0
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
        shapes = {name: (rows, entry.shape[1], room, entry.shape[3]) for name, entry in self._caches.items()}
        self._held = {n: _ort(np.zeros(s, kinds[self._caches[n].type])) for n, s in shapes.items()}
        self._mask = torch.zeros(rows, 0, dtype=torch.int64)

    def rewind(self, length: int) -> None:
        """Hold the first `length` tokens alone; caches in place stay as they are, what is behind is written over."""
        _check_rewind(length, self.length)
        self._mask = self._mask[:, :length]
        if not self._in_place:
            self._held = {n: _ort(v.numpy()[:, :, :length].copy()) for n, v in self._held.items()}

    def follow(self, other: OnnxDecoder) -> None:
        """Go on from what another one holds, in the same buffers: both write in place behind what is held (`CalibrationError` where caches differ)."""
        mine, theirs = ({n: (c.shape[1], c.shape[3], c.type) for n, c in d._caches.items()} for d in (self, other))
        if mine != theirs or (self._in_place, self.longest) != (other._in_place, other.longest):
            raise CalibrationError("decoder: the other one's caches are not of the same sizes, kind and longest text, so they cannot be shared")
        self._held, self._mask = dict(other._held), other._mask

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the new tokens; `attention_mask: [B, n]` has 0 where they are padding (on the left of a text)."""
        if not self._held or (self.length == 0 and len(self._mask) != len(input_ids)):
            self.start(len(input_ids))
        rows, new = input_ids.shape
        if new == 0 or rows != len(self._mask):
            raise CalibrationError(f"decoder: expected at least one new token for each of {len(self._mask)} texts, got ids {list(input_ids.shape)}")
        if self.length + new > self.longest:
            raise CalibrationError(f"decoder: {self.length} tokens are held and {new} come, more than the {self.longest} there is room for; raise longest=")
        if rows > 1 and new > 1 and self.length:
            found = [self(input_ids[:, i : i + 1], None if attention_mask is None else attention_mask[:, i : i + 1]) for i in range(new)]
            return found[-1] if self._last_only else torch.cat(found, 1)
        input_ids = input_ids.long()
        mask = torch.cat([self._mask, torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()], 1)
        logits = self._run({"input_ids": input_ids.contiguous().numpy(), "attention_mask": mask.numpy()})
        self._mask = mask  # a call that fails leaves what is held as it was
        return torch.from_numpy(logits)

    def _run(self, feeds: dict[str, Any]) -> Any:
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        for name, held in self._held.items():
            binding.bind_ortvalue_input(PAST + name, held)
            if self._in_place:
                binding.bind_ortvalue_output(PRESENT + name, held)
            else:
                binding.bind_output(PRESENT + name)
        self.session.run_with_iobinding(binding)
        logits, *grown = binding.get_outputs()
        if not self._in_place:
            self._held = dict(zip(self._held, grown, strict=True))
        return logits.numpy()


def _ort(values: Any) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(values)
