"""SqueezeLLM's clustering as published, for comparison: scikit-learn's KMeans on every row of every linear, weighted by Fisher information.

    python benchmarks/squeezellm_peer.py --bits 2 3 4      # the whole of SmolLM2's 210 linears, resumable; minutes a width and core
    python benchmarks/squeezellm_peer.py --time            # one thread each, a sample of rows, against ours; writes results/kmeans_speed.json

The call is that of the released code (Kim et al., ICML 2024): `KMeans(n_clusters=2^b, random_state=0, n_init="auto", max_iter=50)`, weights `F * (w != 0)`,
one process a row; tables are stored in float16, as the paper counts them.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantization_peers import peers_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxpress.passes import sensitivities
from fxpress.passes.calibrate import as_calls
from fxpress.passes.context import Context
from fxpress.passes.lut.kmeans import cluster_rows
from fxpress.runtime.demo import calibration_batches, load_demo

SAMPLE = 150  # rows of each shape that the timing takes
ROUNDS = 5


def published_tables(matrix: np.ndarray, fisher: np.ndarray, bits: int) -> np.ndarray:
    """Tables `[N, 2^bits]` of rows `[N, K]`."""
    from sklearn.cluster import KMeans

    warnings.filterwarnings("ignore")
    out = np.empty((len(matrix), 2**bits), np.float32)
    for row, (values, weights) in enumerate(zip(matrix, fisher, strict=True)):
        counted = weights * (values != 0)
        counted = counted if counted.sum() > 0 else np.ones_like(counted)
        fitted = KMeans(n_clusters=2**bits, random_state=0, n_init="auto", max_iter=50).fit(values[:, None], sample_weight=counted)
        out[row] = fitted.cluster_centers_[:, 0]
    return out


def nearest(matrix: Tensor, tables: Tensor) -> Tensor:
    """Every weight as its nearest entry, in float16."""
    return torch.cat(
        [t.gather(1, (m.unsqueeze(2) - t.unsqueeze(1)).abs().argmin(2)) for m, t in zip(matrix.split(64), tables.half().float().split(64), strict=True)]
    )


def weights_and_fisher() -> dict[str, tuple[Tensor, Tensor]]:
    """The 210 linears and their Fisher information over the calibration windows (kept in the cache)."""
    data = load_demo()
    weights = {n: p.data for n, p in data.source.model.named_parameters() if "_proj" in n}
    path = peers_folder() / "fisher.safetensors"
    if not path.exists():
        program = data.source.capture()
        ctx = Context(calibration=as_calls(calibration_batches(data.calibration), program.inputs))
        sites = [s for s in program.sites() if f"{s.name}.weight" in weights]
        found = sensitivities.diagonal_fisher(program, sites, ctx)
        save_file({f"{n}.weight": t for n, t in found.items()}, path)
    fisher = load_file(path)
    return {n: (w, fisher[n]) for n, w in weights.items()}


def run(bits: int, linears: Mapping[str, tuple[Tensor, Tensor]], processes: int) -> None:
    """Quantize everything and dump it as the other peers are dumped; finished linears are kept."""
    folder = peers_folder() / f"squeezellm{bits}"
    folder.mkdir(exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        for name, (matrix, fisher) in linears.items():
            path = folder / f"{name}.safetensors"
            if not path.exists():
                parts = zip(np.array_split(matrix.numpy(), 16), np.array_split(fisher.numpy(), 16), strict=True)
                tables = np.concatenate(list(pool.map(partial(_one, bits=bits), parts)))
                save_file({"tables": torch.from_numpy(tables)}, path)
    dump = {n: nearest(m, load_file(folder / f"{n}.safetensors")["tables"]) for n, (m, _) in linears.items()}
    save_file(dump, peers_folder() / f"squeezellm{bits}.safetensors")
    total = sum(m.numel() for m, _ in linears.values())
    stored = sum(bits * m.numel() + 16 * 2**bits * len(m) for m, _ in linears.values()) / total
    facts = {"version": "scikit-learn KMeans, as published", "options": {"bits": bits}, "bits_per_weight": stored, "seconds": 0.0}
    (peers_folder() / f"squeezellm{bits}.json").write_text(json.dumps(facts))
    print(f"squeezellm{bits}: {stored:.3f} bits a weight", flush=True)


def _one(part: tuple[np.ndarray, np.ndarray], bits: int) -> np.ndarray:
    return published_tables(*part, bits=bits)


def objective(matrix: Tensor, fisher: Tensor, tables: Tensor) -> Tensor:
    """Weighted squared error of every row."""
    square = (matrix.double().unsqueeze(2) - tables.double().unsqueeze(1)).square().amin(2)
    return (square * fisher.double()).sum(1)


def compare_speed(linears: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The comparison at each width, once more with every value of a row different, and ours on two threads.

    SmolLM2 comes from 8-bit blocks, so its rows repeat values, which ours merges into one point; other checkpoints in 16 bits repeat fewer, fp32 ones none.
    """
    generator = torch.Generator().manual_seed(0)
    distinct = {n: (m + 1e-5 * torch.randn(m.shape, generator=generator), f) for n, (m, f) in linears.items()}
    published_tables(np.random.default_rng(0).normal(size=(20, 64)), np.ones((20, 64)), 2)  # imports and thread pools are made at the first call
    rows = {f"{bits} bits": side_by_side(f"{bits} bits", list(linears.values()), bits) for bits in (2, 3, 4)}
    rows["4 bits, no value twice"] = side_by_side("4 bits, no value twice", list(distinct.values()), 4)
    began = time.perf_counter()
    for matrix, fisher in linears.values():
        cluster_rows(matrix, fisher, 16, threads=2)
    rows["4 bits, two threads"] = {"ours_seconds": time.perf_counter() - began}
    print(f"4 bits, two threads: {rows['4 bits, two threads']['ours_seconds']:.2f} s for all rows", flush=True)
    return rows


def side_by_side(label: str, linears: Sequence[tuple[Tensor, Tensor]], bits: int) -> dict[str, Any]:
    """Seconds for all rows of all linears, one thread each, alternating: scikit-learn on a sample scaled up, ours on all of it; who is better where."""
    cluster_rows(torch.randn(4, 64), None, 2**bits)
    ours = theirs = 0.0
    gaps = []
    for width in sorted({m.shape[1] for m, _ in linears}):
        pairs = [p for p in linears if p[0].shape[1] == width]
        count = sum(len(m) for m, _ in pairs)
        sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLE]
        matrix, fisher = (torch.cat([p[i] for p in pairs])[sample] for i in (0, 1))
        for part in range(ROUNDS):
            m, f = matrix[part::ROUNDS], fisher[part::ROUNDS]
            began = time.perf_counter()
            tables = torch.from_numpy(published_tables(m.numpy(), f.numpy(), bits))
            theirs += (time.perf_counter() - began) * count / len(matrix)
            for one, weight in pairs[part::ROUNDS]:
                began = time.perf_counter()
                cluster_rows(one, weight, 2**bits)
                ours += time.perf_counter() - began
            gaps.append(objective(m, f, tables) / objective(m, f, cluster_rows(m, f, 2**bits)))
    excess = torch.cat(gaps)
    worse, mean = int((excess < 1 - 1e-6).sum()), float(excess.mean())
    print(f"{label}: published {theirs:.0f} s (scaled), ours {ours:.2f} s: {theirs / ours:.0f}x; its error is {mean:.4f} of ours", flush=True)
    print(f"    ours is worse in {worse} of {len(excess)} rows", flush=True)
    return {"published_seconds": theirs, "ours_seconds": ours, "ratio": theirs / ours, "rows_worse": worse, "error_of_published": mean}


def main() -> None:
    """Run or time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=[])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    linears = weights_and_fisher()
    for bits in arguments.bits:
        run(bits, linears, arguments.processes)
    if arguments.time:
        results = Path(__file__).with_name("results") / "kmeans_speed.json"
        results.write_text(json.dumps(compare_speed(linears), indent=1))


if __name__ == "__main__":
    main()
