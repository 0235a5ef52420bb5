"""One nested model against models of its sizes trained alone, from scratch, on the same batches (MatFormer, arXiv 2310.07707, table 6).

    python benchmarks/nested_training.py [--task lm|vit] [--rows alone nested] [--seconds 3600] [--drafts | --placements]

`lm` is a llama of four layers over the bytes of the packaged Wikipedia sample: trained on even articles, judged on odd ones. `vit` is a vision transformer of
four layers on Fashion-MNIST, judged on the test images. Feed-forward widths S, M, L, XL are 1/8, 1/4, 1/2 and all of the units. Every row has seen the
same number of tokens (images), in as many steps. Rows go to benchmarks/results/nested_training_TASK.json one by one; a run that dies goes on at its last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpress
from fxpress.ir.files import cache_dir
from fxpress.ir.program import Program
from fxpress.passes.base import parse_pass
from fxpress.passes.calibrate import as_calls
from fxpress.passes.checkpoint import Checkpoint
from fxpress.passes.context import Context
from fxpress.passes.examples import Labelled, as_examples
from fxpress.passes.pipeline import run_pipeline
from fxpress.runtime import zoo
from fxpress.runtime.elastic import Elastic
from fxpress.runtime.language import greedy_sample
from fxpress.runtime.speculative import speculate
from fxpress.runtime.zoo_images import fashion_mnist

RESULTS = Path(__file__).with_name("results")
SHARES = {"S": 0.125, "M": 0.25, "L": 0.5, "XL": 1.0}
LAYERS, LENGTH = 4, 128
ORDER = "nest{importance=activation,roles=[ffn]}"
NESTED = {
    "nested: one width a step (MatFormer)": "",
    "nested: a width for each quarter of a batch": "accumulate=4,",
    "nested: all widths in every step (joint)": "joint=true,probabilities=[1,1,1,1],",
    "nested: joint, weights .1 .15 .25 .5": "joint=true,probabilities=[0.1,0.15,0.25,0.5],",
    "nested: joint, weights .1 .15 .25 .6, mixes": "joint=true,probabilities=[0.1,0.15,0.25,0.6],mixes=9,",
    "nested: joint, weights .08 .12 .2 .6": "joint=true,probabilities=[0.08,0.12,0.2,0.6],",
    "nested: joint, weights .25 .2 .2 .35": "joint=true,probabilities=[0.25,0.2,0.2,0.35],",
}


@dataclass(frozen=True)
class Task:
    """Models by their feed-forward width, batches, and what a program scores on held-out data."""

    model: Callable[[int], nn.Module]
    width: int
    batches: list[Any]
    score: Callable[[Program], dict[str, float]]
    options: str
    example: Any
    probe: Callable[[Program], dict[str, float]]
    quarters: Callable[[Any], list[Any]]


def language(steps: int = 900, batch: int = 16) -> Task:
    """Next bytes; loss in nats a byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    articles = zoo.wikipedia_articles()
    training, held_out = (_bytes(articles[start::2]) for start in (0, 1))
    draws = torch.randint(0, len(training) - LENGTH, (steps, batch), generator=torch.Generator().manual_seed(0))
    batches = [_ids(training[row[:, None] + torch.arange(LENGTH)]) for row in draws]
    windows, seen = (data[: count * LENGTH].view(count, LENGTH) for data, count in ((held_out, 256), (training, 64)))

    def model(width: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False)).eval()

    def score(program: Program, windows: Tensor = windows) -> dict[str, float]:
        with torch.no_grad():
            logits = torch.cat([program.run(**_ids(part))["logits"] for part in windows.split(32)])
        return {"loss": float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten()))}

    def quarters(held: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return [_ids(part) for part in held["input_ids"].chunk(4)]

    return Task(model, 512, batches, score, f"steps={steps},lr=3e-3,weight_decay=0.01", _ids(windows[:2]), partial(score, windows=seen), quarters)


def images(epochs: int = 4, batch: int = 64) -> Task:
    """Ten classes; loss and accuracy on the test images."""
    from transformers import ViTConfig, ViTForImageClassification

    pixels, labels = fashion_mnist("train")
    generator = torch.Generator().manual_seed(0)
    order = [part for _ in range(epochs) for part in torch.randperm(len(labels), generator=generator).split(batch) if len(part) == batch]
    batches = [Labelled({"pixel_values": pixels[i]}, labels[i]) for i in order]
    test, truth = fashion_mnist("test")

    def model(width: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 96, "intermediate_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=28, patch_size=7, num_channels=1, num_labels=10)).eval()

    def score(program: Program, test: Tensor = test, truth: Tensor = truth) -> dict[str, float]:
        with torch.no_grad():
            logits = torch.cat([program.run(pixel_values=part)["logits"] for part in test.split(256)])
        return {"loss": float(F.cross_entropy(logits, truth)), "accuracy": 100 * float((logits.argmax(1) == truth).float().mean())}

    def quarters(held: Labelled) -> list[Labelled]:
        parts = zip(held.inputs["pixel_values"].chunk(4), held.target.chunk(4), strict=True)
        return [Labelled({"pixel_values": p}, t) for p, t in parts]

    return Task(
        model,
        384,
        batches,
        score,
        f"steps={len(batches)},lr=1e-3,weight_decay=0.01",
        {"pixel_values": pixels[:2]},
        partial(score, test=pixels[:2048], truth=labels[:2048]),
        quarters,
    )


def _bytes(articles: list[str]) -> Tensor:
    return torch.tensor(list("\n\n".join(articles).encode()), dtype=torch.int64)


def _ids(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids}


def train(task: Task, name: str, share: float, spec: str, label: str) -> tuple[Program, float]:
    """One training run from scratch over the task's batches, once each and in one order; it goes on where a killed one stands."""
    program = fxpress.capture(task.model(round(share * task.width)), task.example, dynamic_shapes=_dynamic(task.example))
    batches = [q for b in task.batches for q in task.quarters(b)] if "accumulate=4" in spec else task.batches
    context = Context(
        calibration=as_calls([_inputs(b) for b in batches[:2]], program.inputs),
        training=as_examples(batches, program.inputs),
        checkpoint=Checkpoint(cache_dir() / "nested-training" / label, name),
    )
    began = time.perf_counter()
    passes = [spec] if spec.startswith("recover") else [ORDER, spec]
    return run_pipeline(program, [parse_pass(p) for p in passes], context).program, time.perf_counter() - began


def _inputs(batch: Any) -> Any:
    return batch.inputs if isinstance(batch, Labelled) else batch


def _dynamic(example: dict[str, Tensor]) -> dict[str, Any]:
    return {name: {0: torch.export.Dim("batch", min=1, max=512)} for name in example}


def mixes() -> list[tuple[str, list[str]]]:
    """Mix'n'Match between adjacent widths, not falling with depth."""
    names = list(SHARES)
    return [(f"{LAYERS - k} x {a}, {k} x {b}", [a] * (LAYERS - k) + [b] * k) for a, b in pairwise(names) for k in range(1, LAYERS)]


def main() -> None:
    """Every row that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("lm", "vit"), default="lm")
    parser.add_argument("--rows", nargs="*", default=[""], help="run rows whose name contains one of these")
    parser.add_argument("--drafts", action="store_true", help="speculative decoding with the trained rows instead (lm): the narrow widths draft")
    parser.add_argument("--placements", action="store_true", help="where wide layers of mixes stand, of the trained rows instead")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so many seconds")
    arguments = parser.parse_args()
    began, out = time.perf_counter(), RESULTS / f"nested_training_{arguments.task}.json"
    task = language() if arguments.task == "lm" else images()
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    common = f"objective=task,held_out=0.02,evaluate_every=200,patience=1000,checkpoint_every=100,{task.options}"
    jobs = {f"alone: {s}": (f"recover{{{common}}}", share) for s, share in SHARES.items()}
    jobs |= {name: (f"train_nested{{{extra}{common}}}", 1.0) for name, extra in NESTED.items()}
    for place, (name, (spec, share)) in enumerate(jobs.items()):
        if arguments.drafts or arguments.placements:
            for row in [r for r in rows if r["row"] == name and share == 1.0 and any(a in name for a in arguments.rows) and "nested" in name]:
                program = train(task, name, share, spec, f"{arguments.task}-{place}")[0]
                row |= {"drafts": drafts(program)} if arguments.drafts else {"placements": placements(task, program, row["sizes"])}
                print(name, json.dumps(row["drafts" if arguments.drafts else "placements"]), flush=True)
                out.write_text(json.dumps(rows, indent=1) + "\n")
            continue
        wanted = any(r in name for r in arguments.rows) and not any(r["row"] == name for r in rows)
        if not wanted or time.perf_counter() - began > arguments.seconds:
            continue
        program, seconds = train(task, name, share, spec, f"{arguments.task}-{place}")
        rows.append({"row": name, "spec": spec, "seconds": seconds, "sizes": scores(task, program, name)})
        print(name, f"{seconds:.0f} s", json.dumps(rows[-1]["sizes"]), flush=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")


def placements(task: Task, program: Program, sizes: dict[str, dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """By mix: how far it lies above the line between its neighbours with the wide layers last, first, and where training data say."""
    elastic, found = Elastic(program), {}
    for a, b in pairwise(SHARES):
        for k in range(1, LAYERS):
            views = {c: elastic.at([round(SHARES[b if i in c else a] * task.width) for i in range(LAYERS)]) for c in combinations(range(LAYERS), k)}
            chosen = min(views, key=lambda c: task.probe(views[c])["loss"])
            line = {m: (1 - k / LAYERS) * sizes[a][m] + k / LAYERS * sizes[b][m] for m in sizes[a] if m != "parameters"}
            ways = {"last": tuple(range(LAYERS - k, LAYERS)), "first": tuple(range(k)), "searched": chosen}
            found[f"{LAYERS - k} x {a}, {k} x {b}"] = {way: {m: v - line[m] for m, v in task.score(views[c]).items()} for way, c in ways.items()}
    return found


def scores(task: Task, program: Program, name: str) -> dict[str, dict[str, float]]:
    """A model trained alone at its size; a nested one at every width and mix, with the parameters that are left."""
    if name.startswith("alone"):
        return {name.removeprefix("alone: "): task.score(program) | {"parameters": program.parameters}}
    elastic = Elastic(program)
    widths = [(n, [n] * LAYERS) for n in SHARES] + mixes()
    views = {n: elastic.at([round(SHARES[w] * task.width) for w in ws]) for n, ws in widths}
    return {n: task.score(view) | {"parameters": view.parameters} for n, view in views.items()}


def drafts(program: Program, prompts: int = 8, prompt: int = 32, ahead: int = 4) -> dict[str, dict[str, float]]:
    """Greedy continuations of held-out text to the full length, each checked against plain decoding; CPU seconds of plain over speculative decoding."""
    text = _bytes(zoo.wikipedia_articles()[1::2])
    ids = text[: prompts * 997].view(prompts, 997)[:, :prompt]
    elastic, found = Elastic(program), {}
    full = _padded(program)
    for width in ("S", "M", "L"):
        small, seconds, accepted, checks = _padded(elastic.at(SHARES[width])), [0.0, 0.0], 0, 0
        for one in ids.split(1):
            began = time.process_time()
            plain = greedy_sample(full, one, LENGTH - prompt)
            middle = time.process_time()
            ours = speculate(full, small, one, LENGTH - prompt, ahead=ahead)
            seconds = [seconds[0] + middle - began, seconds[1] + time.process_time() - middle]
            assert torch.equal(ours.ids, plain), "speculative decoding gave another text"
            accepted, checks = accepted + sum(ours.accepted), checks + len(ours.accepted)
        found[width] = {"ahead": ahead, "mean_accepted": accepted / checks, "times_faster": seconds[0] / seconds[1]}
    return found


def _padded(program: Program) -> Callable[[Tensor], Tensor]:
    """Logits of shorter texts by a program of one length: what stands behind a position does not change it."""

    def logits(ids: Tensor) -> Tensor:
        return program.run(**_ids(F.pad(ids, (0, LENGTH - ids.shape[1]))))["logits"][:, : ids.shape[1]]

    return logits


if __name__ == "__main__":
    main()
