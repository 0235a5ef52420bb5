"""HQQ and NNCF as the peers of `benchmarks/quality.py`: SmolLM2-135M's linears quantized by them, dumped as the weights their models compute with.

    python benchmarks/quantization_peers.py prepare               # the model and the calibration windows, for the peers
    python3 -m venv peers-env
    peers-env/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors hqq==0.2.8.post1 nncf==3.4.0 openvino==2026.4.1
    OMP_NUM_THREADS=1 peers-env/bin/python benchmarks/quantization_peers.py hqq --bits 2 3 4
    OMP_NUM_THREADS=1 peers-env/bin/python benchmarks/quantization_peers.py nncf
    python benchmarks/quantization_peers.py evaluate --windows 8 16

All lies in `~/.cache/fxpress/peers` (`FXPRESS_CACHE`): `NAME.safetensors` with Hugging Face names, `NAME.json` with the version, the options, the bits that
the peer stores per weight, and the seconds it took. Quantized are the linears of the decoder layers, not the embedding, nor the output layer tied to it.
Compare with recipes that say `skip=[lm_head]`: passes here take it too (RTN at 3 bits, 8 windows: perplexity 107 with the output layer, 57 without).
This file imports no peer at its top, so that `load_peer` and `apply_peer` serve other benchmarks in the main environment.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 64
PEERS = ("hqq4", "hqq3", "hqq2", "nncf4")


def peers_folder() -> Path:
    """Where the model for the peers and their dumps lie."""
    folder = Path(os.environ.get("FXPRESS_CACHE", "~/.cache/fxpress")).expanduser() / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_peer(name: str) -> dict[str, Tensor] | None:
    """The tensors that a peer changed, dequantized, under their Hugging Face names; None when it has not been run."""
    path = peers_folder() / f"{name}.safetensors"
    return load_file(path) if path.exists() else None


def peer_facts(name: str) -> dict[str, Any]:
    """What `NAME.json` says: `version`, `options`, `bits_per_weight`, `seconds`, `notes`."""
    return json.loads((peers_folder() / f"{name}.json").read_text(encoding="utf-8"))


def apply_peer(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Write a peer's tensors into the Hugging Face model, in place, and return it. The embedding and the output layer tied to it stay dense."""
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(tensors) - set(parameters)):
        raise SystemExit(f"{len(unknown)} dumped tensors are not in the model, first {unknown[0]}; rerun the peer after `prepare`")
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
    return model


def prepare() -> None:
    """Save the zoo's SmolLM2 as a Hugging Face folder, and the calibration windows of `quality.py`."""
    from fxpress.runtime.demo import load_demo

    data = load_demo()
    folder: Any = peers_folder() / "smollm2"
    data.source.model.save_pretrained(folder)  # type: ignore[operator]
    data.source.tokenizer.save_pretrained(folder)
    save_file({"calibration": data.calibration}, peers_folder() / "windows.safetensors")
    print(f"saved {folder}, and {list(data.calibration.shape)} calibration tokens")


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _dump(name: str, tensors: dict[str, Tensor], stored: int, facts: dict[str, Any]) -> None:
    """Write the dump and its facts; `stored` is what the peer stores for the linears, in bytes."""
    weights = sum(t.numel() for n, t in tensors.items() if _is_linear(n))
    facts = {**facts, "bits_per_weight": 8 * stored / weights, "linears": sum(map(_is_linear, tensors))}
    save_file({n: t.contiguous() for n, t in tensors.items()}, peers_folder() / f"{name}.safetensors")
    (peers_folder() / f"{name}.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print(f"{name}: {facts['linears']} linears, {facts['bits_per_weight']:.3f} bits per weight, {facts['seconds']:.0f} s", flush=True)


def run_hqq(bits: int) -> None:
    """HQQ (Badri & Shaji 2023), its defaults: needs no data; scales and zero points are kept in float16, its compute type.

    Its zero points are not integers, so no code means exactly 0. On this model that costs more than its solver gains at 3 bits: the same package with
    `optimize=False, round_zero=True`, which is plain rounding, has perplexity 57 over 8 windows where the defaults have 178.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # type: ignore[import-not-found]

    options = {"nbits": bits, "group_size": GROUP, "axis": 1}
    began, stored, tensors = time.perf_counter(), 0, {}
    for name, weight in load_file(peers_folder() / "smollm2" / "model.safetensors").items():
        if _is_linear(name):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight
            small = HQQLinear(layer, BaseQuantizeConfig(**options), compute_dtype=torch.float16, device="cpu")
            stored += sum(t.nbytes for t in (small.W_q, small.meta["scale"], small.meta["zero"]))
            tensors[name] = small.dequantize().detach()
    facts = {"version": f"hqq {version('hqq')}", "options": {**options, "compute_dtype": "float16"}, "seconds": time.perf_counter() - began}
    _dump(f"hqq{bits}", tensors, stored, facts)


def run_nncf(tokens: int) -> None:
    """NNCF's data-aware INT4_ASYM with AWQ and scale estimation, torch backend, on the calibration windows cut into samples of `tokens` tokens.

    NNCF keeps one mean activation vector a sample. AWQ rescales each up projection against the down projection that follows it; nothing else moves.
    """
    import nncf  # type: ignore[import-not-found]
    from nncf.torch.function_hook import get_hook_storage  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    windows = load_file(peers_folder() / "windows.safetensors")["calibration"]
    folder = peers_folder() / "smollm2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calls = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False} for ids in windows.reshape(-1, 1, tokens)]
    mode, backup = nncf.CompressWeightsMode.INT4_ASYM, nncf.BackupMode.NONE
    options = {"group_size": GROUP, "ratio": 1.0, "awq": True, "scale_estimation": True, "subset_size": len(calls)}
    began = time.perf_counter()
    small = nncf.compress_weights(model, mode=mode, backup_mode=backup, dataset=nncf.Dataset(calls), **options)
    seconds = time.perf_counter() - began
    hooks = {name.split(".", 1)[1].split("__")[0].replace(":", "."): hook for name, hook in get_hook_storage(small).named_hooks()}
    stored, tensors = 0, {}
    with torch.no_grad():
        for name, weight in small.named_parameters():
            if name in hooks:
                stored += weight.nbytes + sum(b.nbytes for b in hooks[name].buffers())
                tensors[name] = hooks.pop(name)(weight)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors |= {n: p.data for n, p in small.named_parameters() if n not in tensors and not torch.equal(p, dense.get_parameter(n))}
    facts = {
        "version": f"nncf {version('nncf')}",
        "options": {"mode": "INT4_ASYM", "backup_mode": "NONE", **options, "samples": [len(calls), tokens]},
        "seconds": seconds,
        "changed_besides_linears": [n for n in tensors if not _is_linear(n)],
        "hooks_not_dumped": sorted(hooks),
        "max_logit_difference_of_dump": _logit_difference(small, apply_peer(dense, tensors), calls[0]),
    }
    _dump("nncf4" if tokens == windows.shape[1] else f"nncf4-{tokens}", tensors, stored, facts)


def _logit_difference(a: nn.Module, b: nn.Module, call: dict[str, Any]) -> float:
    with torch.no_grad():
        return float((a(**call).logits - b(**call).logits).abs().max())


def evaluate(counts: list[int], names: list[str]) -> list[dict[str, Any]]:
    """Perplexity of the dense model and of every dumped peer over `quality.py`'s windows, printed; distance to the dense model over the first two."""
    from fxpress.runtime import zoo
    from fxpress.runtime.demo import WINDOW
    from fxpress.runtime.language import compare_logits, logits_of, perplexity

    model, tokenizer = zoo.load_smollm2()
    dense, _ = zoo.load_smollm2()
    articles = zoo.wikipedia_articles()[1::2]
    windows = {count: zoo.token_windows(tokenizer, articles, length=WINDOW, count=count) for count in counts}
    rows: list[dict[str, Any]] = []
    print(f"{'peer':<20} " + " ".join(f"{f'ppl/{count}':>10}" for count in counts) + f" {'KL':>8} {'top-1':>6} {'bits*':>7} {'seconds':>8}")
    for name in ["dequantized fp32", *names]:
        tensors = load_peer(name)
        if tensors is None and name in names:
            print(f"{name:<20} not run")
            continue
        model = apply_peer(model, dict(dense.named_parameters()) | (tensors or {}))
        facts = peer_facts(name) if tensors else {"bits_per_weight": 32.0, "seconds": 0.0}
        agreement = compare_logits(logits_of(dense), logits_of(model), windows[counts[-1]][:2])
        scores = {count: perplexity(logits_of(model), w, batch=2).perplexity for count, w in windows.items()}
        rows.append({"recipe": name, "perplexity": scores, "kl": agreement.kl, "top1": agreement.top1_agreement, **facts})
        columns = " ".join(f"{s:10.3f}" for s in scores.values())
        print(
            f"{name:<20} {columns} {agreement.kl:8.4f} {100 * agreement.top1_agreement:6.1f} {facts['bits_per_weight']:7.3f} {facts['seconds']:8.0f}",
            flush=True,
        )
    return rows


def main() -> None:
    """One subcommand a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("prepare", help="main environment: save the model and the windows")
    steps.add_parser("hqq", help="peers' environment").add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    steps.add_parser("nncf", help="peers' environment").add_argument("--tokens", type=int, default=512, help="tokens a calibration sample; divides 512")
    last = steps.add_parser("evaluate", help="main environment: perplexities")
    last.add_argument("--windows", type=int, nargs="+", default=[8, 16], help="how many evaluation windows of 512 tokens; several: one column each")
    last.add_argument("--names", nargs="+", default=list(PEERS), help="the dumps to evaluate")
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        prepare()
    elif arguments.step == "hqq":
        for bits in arguments.bits:
            run_hqq(bits)
    elif arguments.step == "nncf":
        run_nncf(arguments.tokens)
    else:
        evaluate(arguments.windows, arguments.names)


if __name__ == "__main__":
    main()
