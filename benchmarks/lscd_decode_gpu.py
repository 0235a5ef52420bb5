"""One decode step of a stack of transformer blocks with random weights, in CUDA graphs: dense float16 (cuBLAS) against every form of the Triton kernels.

    python benchmarks/lscd_decode_gpu.py [--blocks 2] [--context 512]                # a CUDA device
    TRITON_INTERPRET=1 python benchmarks/lscd_decode_gpu.py --tiny                   # no GPU: to see that the script works

Blocks have the shapes of OPT-30B (LayerNorm, biases, ReLU) and LLaMA-2-7B (RMSNorm, gated SiLU; without its rotary embedding). One new token a sequence
attends to a cache of fixed length. Errors are against the same step in float32 with the contestant's own weights. Writes results/lscd_decode_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lscd_forms import CUDA, DEVICE, weights
from lscd_gpu import replayed, timed
from torch import Tensor

from fxpress.codegen.triton_target.layout import Packed
from fxpress.codegen.triton_target.operators import describe

DENSE = "dense float16 (cuBLAS)"
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one block; `gated`: LLaMA's, else OPT's."""

    hidden: int
    heads: int
    inner: int
    gated: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the four products of a block."""
        up = 2 * self.inner if self.gated else self.inner
        return {"qkv": (3 * self.hidden, self.hidden), "out": (self.hidden, self.hidden), "up": (up, self.hidden), "down": (self.hidden, self.inner)}


SHAPES = {
    "OPT-30B": Shape(hidden=7168, heads=56, inner=28672, gated=False),
    "LLaMA-2-7B": Shape(hidden=4096, heads=32, inner=11008, gated=True),
}
TINY = {"tiny OPT": Shape(hidden=64, heads=2, inner=128, gated=False), "tiny LLaMA": Shape(hidden=64, heads=2, inner=96, gated=True)}
BATCHES = (1, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Four products and a cache `[2, batch, heads, context, width]`, whose last place the step writes."""

    shape: Shape
    linears: dict[str, Linear]
    cache: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`x: [batch, hidden]` through the block."""
        x = x + self.linears["out"](self._attend(self._norm(x)))
        inner = self.linears["up"](self._norm(x))
        if self.shape.gated:
            gate, value = inner.chunk(2, -1)
            return x + self.linears["down"](F.silu(gate) * value)
        return x + self.linears["down"](F.relu(inner))

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,)) if self.shape.gated else F.layer_norm(x, (self.shape.hidden,))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.linears["qkv"](x).unflatten(-1, (3, self.shape.heads, 1, -1)).unbind(1)
        self.cache[0, :, :, -1:].copy_(k)
        self.cache[1, :, :, -1:].copy_(v)
        return F.scaled_dot_product_attention(q, self.cache[0], self.cache[1]).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Blocks of one contestant, the same in float32, and the bytes of its weights."""

    blocks: list[Block]
    exact: list[Block]
    nbytes: int


def build(name: str, shape: Shape, blocks: int, batch: int, context: int) -> Stack:
    """A stack whose weights have the form `name`."""
    made, exact, nbytes = [], [], 0
    for i in range(blocks):
        torch.manual_seed(i)
        cache = torch.randn(2, batch, shape.heads, context, shape.hidden // shape.heads, device=DEVICE).half()
        ours: dict[str, Linear] = {}
        theirs: dict[str, Linear] = {}
        for part, (rows, columns) in shape.linears.items():
            bias = None if shape.gated else (torch.randn(rows, device=DEVICE) / 8).half()
            packed, equal = weights(rows, columns)["4 bits" if name == DENSE else name]()
            scale = 1 / (columns**0.5 * float(equal[:64].float().std()))  # products about as large as their input
            nbytes += equal.nbytes if name == DENSE else packed.nbytes
            ours[part] = _dense(equal, bias, scale) if name == DENSE else _packed(packed, bias, scale)
            theirs[part] = _exact(equal, bias, scale)
        made.append(Block(shape=shape, linears=ours, cache=cache))
        exact.append(Block(shape=shape, linears=theirs, cache=cache.float()))
    return Stack(blocks=made, exact=exact, nbytes=nbytes)


def _dense(weight: Tensor, bias: Tensor | None, scale: float) -> Linear:
    return lambda x: F.linear(x * scale, weight, bias)


def _exact(weight: Tensor, bias: Tensor | None, scale: float) -> Linear:
    return lambda x: F.linear(x * scale, weight.float(), None if bias is None else bias.float())


def _packed(packed: Packed, bias: Tensor | None, scale: float) -> Linear:
    layout, tensors = describe(packed), list(packed.tensors)
    return lambda x: torch.ops.fxpress_triton.linear(x * scale, tensors, bias, layout, packed.rows)


def step(blocks: list[Block], x: Tensor) -> Tensor:
    """One token a sequence through all blocks, `[batch, hidden]`."""
    for block in blocks:
        x = block(x)
    return x


def run(shape: Shape, blocks: int, batch: int, context: int, rounds: int) -> dict[str, Any]:
    """Errors and microseconds of every contestant."""
    x = torch.randn(batch, shape.hidden, device=DEVICE).half()
    names = [DENSE, *(n for n in weights(64, 64) if "30%" not in n and "70%" not in n and "90%" not in n)]
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, Any] = {}
    for name in names:
        stack = build(name, shape, blocks, batch, context)
        exact = step(stack.exact, x.float())
        error = float((step(stack.blocks, x).float() - exact).abs().max() / exact.abs().max())
        facts[name] = {"error": error, "weight_megabytes": stack.nbytes / 1e6}
        calls[name] = lambda b=stack.blocks: step(b, x)
        del stack, exact
    for name, microseconds in timed({name: replayed(call) for name, call in calls.items()}, rounds).items():
        facts[name] |= {"microseconds": microseconds, "tokens_per_second": batch * 1e6 / microseconds}
    for row in facts.values():
        row["speedup"] = facts[DENSE]["microseconds"] / row["microseconds"]
    return facts


def main() -> None:
    """Every shape and batch; one line a contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="blocks in the stack")
    parser.add_argument("--context", type=int, default=512, help="places of the cache")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, one round: a smoke test that needs no GPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="stop starting new shapes after so long")
    arguments = parser.parse_args()
    if not (CUDA or arguments.tiny):
        raise SystemExit("no CUDA device; to try the script without one: TRITON_INTERPRET=1 python benchmarks/lscd_decode_gpu.py --tiny")
    blocks, context, rounds = (1, 8, 1) if arguments.tiny else (arguments.blocks, arguments.context, 20)
    began, results = time.perf_counter(), {}
    for batch, (name, shape) in product((2,) if arguments.tiny else BATCHES, (TINY if arguments.tiny else SHAPES).items()):
        if time.perf_counter() - began > 60 * arguments.minutes:
            print(f"time is up before {name}, batch {batch}")
            continue
        results[f"{name} batch {batch}"] = found = run(shape, blocks, batch, context, rounds)
        for contestant, row in found.items():
            print(f"{name} batch {batch:<3} {contestant:<26} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    if CUDA:
        name = torch.cuda.get_device_name().replace(" ", "_")
        facts = {"device": name, "blocks": blocks, "context": context, "rows": results}
        Path(__file__).with_name("results").joinpath(f"lscd_decode_{name}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
