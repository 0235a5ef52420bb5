"""Sentence embeddings of all-MiniLM-L6-v2, dense or compressed: agreement with people on the Lee-50 documents, and with the dense model on held-out passages.

    from sentence_quality import minilm, score
    source = minilm()                      # model, example inputs, dynamic shapes, tokenizer, calibration batches
    result = fxpress.optimize(source.capture(), "quantize_gptq{bits=4,group_size=64}", calibration=source.calibration)
    score(result.lower("reference"))       # {"pearson": ..., "spearman": ..., "cosine_mean": ..., "cosine_p5": ...}

    python benchmarks/sentence_quality.py  # the dense model: Pearson 0.656, Spearman 0.508

Lee-50 (Lee, Pincombe & Welsh 2005; in gensim's wheel): 50 news texts, people's mean similarity of all 1,225 pairs. The passages are paragraphs of gensim's
Wikipedia sample: the calibration takes them from even articles, the evaluation from odd ones. Judge by the cosines: the correlations move by 0.02 either
way under quantization (3-bit GPTQ scores above the dense model), which is within what 50 texts can tell apart.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.ir.program import Program
from fxpress.runtime import zoo
from fxpress.runtime.sources import Source, text_inputs
from fxpress.runtime.zoo_models import load_minilm

TESTS = "gensim/test/test_data/"
LEE_TEXTS = zoo.Asset(
    requirement=zoo.WIKIPEDIA.requirement, member=TESTS + "lee.cor", sha256="a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e"
)
LEE_RATINGS = zoo.Asset(
    requirement=zoo.WIKIPEDIA.requirement, member=TESTS + "similarities0-1.txt", sha256="23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79"
)
LONGEST = 256  # tokens; the model was trained on shorter texts, and no Lee text is longer
BATCH = 16


def minilm(*, passages: int = 128) -> Source:
    """all-MiniLM-L6-v2 with any batch and length, and `passages` calibration passages in batches of similar length, cut so that nothing is padded."""
    model, tokenizer = load_minilm()
    texts = _passages(zoo.wikipedia_articles()[0::2], passages)
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("length", min=2, max=512)}
    example = text_inputs(torch.randint(1000, 30000, (2, 16), generator=torch.Generator().manual_seed(0)))
    batches = [text_inputs(_cut(tokenizer, texts, rows)) for rows in _by_length(tokenizer, texts)]
    return Source(model=model, example_inputs=example, dynamic_shapes=dict.fromkeys(example, axes), calibration=batches, tokenizer=tokenizer)


def score(model: Program | nn.Module | Callable[..., Any]) -> dict[str, float]:
    """Lee-50 correlations of a model called with `input_ids` and `attention_mask: [B, T]`, and the cosine between its embeddings and the dense model's.

    `pearson`, `spearman`: people's and the model's similarities of 1,225 pairs; `cosine_mean`, `cosine_p5` (5th percentile): over 200 held-out passages.
    """
    tokenizer, lee, ratings, held_out, dense = _reference()
    found = embed(model, tokenizer, [*lee, *held_out])
    rows, columns = np.triu_indices(len(lee), 1)
    similar = (found[: len(lee)] @ found[: len(lee)].T).numpy()[rows, columns]
    cosine = (found[len(lee) :] * dense).sum(1)
    return {
        "pearson": _correlation(similar, ratings),
        "spearman": _correlation(_ranks(similar), _ranks(ratings)),
        "cosine_mean": float(cosine.mean()),
        "cosine_p5": float(cosine.quantile(0.05)),
    }


def embed(model: Program | nn.Module | Callable[..., Any], tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit sentence embeddings `[len(texts), 384]`: `last_hidden_state: [B, T, 384]` averaged over the attention mask."""
    found: dict[int, Tensor] = {}
    for rows in _by_length(tokenizer, texts):
        inputs = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, truncation=True, max_length=LONGEST)
        mask = inputs["attention_mask"]
        with torch.no_grad():
            hidden = model(input_ids=inputs["input_ids"], attention_mask=mask)["last_hidden_state"].float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found |= zip(rows, F.normalize(mean), strict=True)
    return torch.stack([found[i] for i in range(len(texts))])


@cache
def _reference() -> tuple[Any, list[str], np.ndarray, list[str], Tensor]:
    """Tokenizer, Lee texts, their ratings `[1225]`, held-out passages, and the dense embeddings of the passages."""
    model, tokenizer = load_minilm()
    lee = zoo.read_member(LEE_TEXTS).decode("latin1").splitlines()
    matrix = np.loadtxt(io.BytesIO(zoo.read_member(LEE_RATINGS)))
    held_out = _passages(zoo.wikipedia_articles()[1::2], 200)
    return tokenizer, lee, matrix[np.triu_indices(len(lee), 1)], held_out, embed(model, tokenizer, held_out)


def _passages(articles: Sequence[str], count: int) -> list[str]:
    """Paragraphs of 150 to 900 characters, evenly spread over the articles."""
    found = list(dict.fromkeys(p.strip() for a in articles for p in a.split("\n") if 150 <= len(p.strip()) <= 900))
    return [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]]


def _by_length(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Batches of row numbers, short texts first."""
    order = np.argsort(_lengths(tokenizer, texts), kind="stable").tolist()
    return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]


def _cut(tokenizer: Any, texts: Sequence[str], rows: list[int]) -> Tensor:
    """Token ids `[B, T]` of some texts, all cut to the shortest one's length."""
    chosen = [texts[i] for i in rows]
    return tokenizer(chosen, return_tensors="pt", truncation=True, max_length=min(_lengths(tokenizer, chosen)))["input_ids"]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


if __name__ == "__main__":
    print(json.dumps(score(load_minilm()[0]), indent=1))
