"""A language model as a folder that serves: `model.onnx`, its tokenizer, and the `genai_config.json` of onnxruntime-genai, which loads it as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codegen.onnx_target.export import OnnxReport, export_onnx
from ..ir.errors import ArtifactError, CalibrationError, LowerError, MissingExtraError
from ..ir.files import atomic_folder
from ..ir.program import Program
from .causal_lm import CACHE, last_logits
from .decoding import PAST, PRESENT, OnnxDecoder
from .folders import TOKENIZER
from .generation import Sampling, generate, stream_text

CONFIG = "genai_config.json"
MODEL = "model.onnx"
CONTEXT = 5  # tokens of the prompt that new ones are decoded with


def save_serving(
    program: Program, model: nn.Module, tokenizer: Any, folder: str | Path, *, portable: bool = False, all_logits: bool = False, progress: bool = False
) -> OnnxReport:
    """Write the folder and return the report of the ONNX file in it.

    Args:
        program: of `capture_causal_lm`, compressed or not.
        model: the transformers model it came from, for its configs (special tokens, longest text).
        tokenizer: its tokenizer.
        folder: where to.
        portable: attention in standard operators (docs/onnx.md).
        all_logits: return logits of every position, which scoring needs; else of the last one alone.
        progress: show what is being done.

    Raises:
        LowerError: for a program without caches; and what `export_onnx` raises. Nothing is left behind then.
    """
    if program.inputs.caches != (CACHE,):
        raise LowerError("save_serving: the program has no caches; capture the model with fxpress.capture_causal_lm")
    config = genai_config(program, model)
    with atomic_folder(Path(folder), own=(f"{MODEL}*", CONFIG, *TOKENIZER)) as scratch:
        report = export_onnx(program if all_logits else last_logits(program), scratch / MODEL, portable=portable, merge=True, progress=progress)
        config["search"]["past_present_share_buffer"] = report.caches_in_place
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(scratch)
    uneven = len({tuple(v.shape) for v in program.inputs.cached}) > 1
    why = "layers have caches of unequal sizes, which onnxruntime-genai does not take; `fxpress generate` runs the folder"
    return replace(report, path=str(Path(folder) / MODEL), notes=(*report.notes, *([why] if uneven else [])))


def genai_config(program: Program, model: nn.Module) -> dict[str, Any]:
    """What onnxruntime-genai reads; its type is `decoder`, the generic one, whatever the architecture."""
    sizes: Any = model.config
    chosen = getattr(model, "generation_config", None)
    text: Any = sizes.get_text_config() if hasattr(sizes, "get_text_config") else sizes
    caches = program.inputs.cached
    special = {n: _known(getattr(chosen, n, None), getattr(sizes, n, None)) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = special["eos_token_id"]
    special["pad_token_id"] = _known(special["pad_token_id"], ends[0] if isinstance(ends, list) else ends, 0)
    limit = int(getattr(text, "max_position_embeddings", None) or 4096)
    longest = min(limit, program.inputs.longest("new") or limit)
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": caches[0].shape[3],
        "hidden_size": text.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": f"{PAST}%d.key",
            "past_value_names": f"{PAST}%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": f"{PRESENT}%d.key", "present_value_names": f"{PRESENT}%d.value"},
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": len(caches) // 2,
        "num_key_value_heads": caches[0].shape[1],
    }
    search: dict[str, Any] = {"do_sample": False, "max_length": longest, "min_length": 0, "num_beams": 1, "num_return_sequences": 1, "early_stopping": True}
    search |= {
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "diversity_penalty": 0.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    known: dict[str, Any] = {n: v for n, v in special.items() if v is not None}
    return {"model": known | {"context_length": longest, "decoder": decoder, "type": "decoder", "vocab_size": text.vocab_size}, "search": search}


def _known(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


class Served:
    """A folder of `save_serving`, ready to write text in ONNX Runtime."""

    def __init__(self, folder: str | Path, *, longest: int | None = None, threads: int | None = None) -> None:
        root = Path(folder)
        config = _read(root)
        self.context = int(config["model"]["context_length"])
        ends = config["model"].get("eos_token_id", [])
        self.ends = tuple(ends) if isinstance(ends, list) else (ends,)
        self.tokenizer = _tokenizer(root)
        try:
            self.decoder = OnnxDecoder(root / MODEL, longest=min(longest or self.context, self.context), threads=threads)
        except LowerError:
            raise
        except Exception as error:  # ONNX Runtime's have no base of their own
            raise ArtifactError(f"{root / MODEL} does not load: {error}; save the folder again") from error
        self._turn = 0

    def stream(self, prompt: str, *, most: int = 256, sampling: Sampling | None = None, stops: tuple[str, ...] = ()) -> Iterator[str]:
        """The continuation of `prompt`, piece by piece; it ends at an end token, before a stop string, after `most` tokens, or when the context is full."""
        ids = torch.tensor(self.tokenizer.encode(prompt), dtype=torch.int64)
        if not prompt or len(ids) == 0:
            raise CalibrationError("generate: the prompt is empty; give at least one token")
        if len(ids) >= self.decoder.longest:
            raise CalibrationError(f"generate: the prompt has {len(ids)} tokens, the context {self.decoder.longest}; shorten it")
        special = set(stops) & set(self.tokenizer.all_special_tokens)
        ends = (*self.ends, *self.tokenizer.convert_tokens_to_ids(sorted(special)))
        tokens = generate(self._own_turn(), ids, most=min(most, self.decoder.longest - len(ids)), sampling=sampling, ends=ends)
        return stream_text(tokens, self.tokenizer, stops=[s for s in stops if s not in special], before=ids[-CONTEXT:].tolist())

    def _own_turn(self) -> Callable[[Tensor], Tensor]:
        """The decoder for one text, begun anew at its first call; it serves one text at a time."""
        mine = 0

        def step(ids: Tensor) -> Tensor:
            nonlocal mine
            if mine == 0:
                self._turn += 1
                mine = self._turn
                self.decoder.start()
            elif mine != self._turn:
                raise CalibrationError("generate: another text was begun on this model before this one ended; open the folder once for each of them")
            return self.decoder(ids)

        return step


def _read(root: Path) -> dict[str, Any]:
    missing = [n for n in (MODEL, CONFIG) if not (root / n).is_file()]
    if not (root / "tokenizer.json").is_file() and not (root / "tokenizer_config.json").is_file():
        missing.append("tokenizer.json")
    if missing:
        raise ArtifactError(f"{root}: {', '.join(missing)} is missing; expected a folder that save_serving wrote")
    try:
        config: dict[str, Any] = json.loads((root / CONFIG).read_text(encoding="utf-8"))
        int(config["model"]["context_length"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{root / CONFIG} is damaged: {type(error).__name__}: {error}; save the folder again") from error
    return config


def _tokenizer(root: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"reading the tokenizer of {root}") from error
    try:
        return AutoTokenizer.from_pretrained(root)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{root}: its tokenizer does not load ({error}); save the folder again") from error
