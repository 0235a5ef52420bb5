"""Machine code of a kernel variant, compiled ahead of time for a GPU that need not be here, and what its main loop costs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...ir.errors import LowerError
from .kernels.matmul import lscd_matmul
from .launch import variant
from .layout import TENSORS, Packed
from .schedule import HOPPER, Schedule
from .slots import CHUNK

WARP = 32
_TYPES = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_\S+):")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_\S+?)\)")


@dataclass(frozen=True, kw_only=True)
class LoopCost:
    """What the main loop of a variant takes: machine instructions a weight, shared-memory ones for 32 weights, and resources of the whole kernel.

    `slot`: thread instructions that an outlier takes, in the loop behind the main one; 0 where there are none.
    """

    instructions: float
    shared: float
    registers: int
    spilled: int
    copies: int
    shared_bytes: int
    slot: float = 0.0


def loop_cost(packed: Packed, architecture: int, schedule: Schedule | None = None) -> LoopCost:
    """Compile `lscd_matmul` for `packed` and compute capability `architecture` (80, 90, ...); about a second, no GPU needed."""
    schedule = schedule or Schedule()
    compiled = _compile(packed, architecture, schedule)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code, resources = _tool("nvdisasm", "-c", cubin), _tool("cuobjdump", "-res-usage", cubin)
    loops = matrix_loops(code)
    count = Counter(_mnemonic(line) for line in loops[0])
    share = schedule.warps * WARP / (packed.tile.rows * packed.tile.columns)  # thread instructions a weight that one warp instruction is
    return LoopCost(
        instructions=count.total() * share,
        shared=WARP * share * sum(n for name, n in count.items() if name.startswith(("LDS", "STS"))),
        registers=int(re.findall(r"REG:(\d+)", resources)[-1]),
        spilled=int(re.findall(r"STACK:(\d+)", resources)[-1]) + sum(n for name, n in count.items() if name.startswith(("LDL", "STL"))),
        copies=sum(n for name, n in count.items() if name.startswith("LDGSTS")),
        shared_bytes=compiled.metadata.shared,
        slot=len(loops[1]) * schedule.warps * WARP / CHUNK if packed.slots.numel() else 0.0,
    )


def _compile(packed: Packed, architecture: int, schedule: Schedule) -> Any:
    """Pointers are told to be aligned to 16 bytes, M and K to be multiples of 16: without that no copy is asynchronous."""
    if not hasattr(lscd_matmul, "arg_names") or not callable(getattr(lscd_matmul, "warmup", None)):
        raise LowerError("compiling ahead of time needs Triton's compiler, and TRITON_INTERPRET=1 has replaced it; unset it before fxpress is imported")
    constants = variant(packed, architecture // 10 == HOPPER) | {
        "BN": schedule.tokens,
        "GROUPED": packed.groups > 1,
        "BIASED": True,
        "EVEN": True,
        "SLOTS": CHUNK if packed.slots.numel() else 0,
        "STAGES": schedule.stages,
        "NATIVE": True,
    }
    kind = _TYPES[packed.dtype]
    signature = {name: _TYPES[t.dtype] for name, t in zip(TENSORS, packed.tensors, strict=True)} | {"x": kind, "bias": "*fp32", "y": kind}
    signature |= dict.fromkeys(("M", "N", "K", "tiles", "groups", "turns"), "i32") | dict.fromkeys(constants, "constexpr")
    names = list(lscd_matmul.arg_names)
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in (*TENSORS, "x", "bias", "y", "M", "K")}
    source = ASTSource(fn=lscd_matmul, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options={"num_warps": schedule.warps, "num_stages": schedule.stages})


def _tool(name: str, flag: str, cubin: Path) -> str:
    """Output of one of the disassemblers that the triton wheel brings."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), flag, str(cubin)], check=True, capture_output=True, text=True).stdout


def matrix_loops(code: str) -> list[list[str]]:
    """Instructions of the loops with a matrix instruction in them, in the order of the code: from a label to the last branch back to it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if (label := _LABEL.match(line.strip())) is not None:
            labels[label[1]] = len(lines)
        elif (instruction := _INSTRUCTION.search(line)) is not None:
            lines.append(instruction[1].strip())
    back = {labels[b[1]]: i + 1 for i, line in enumerate(lines) if (b := _BRANCH.search(line)) and labels.get(b[1], i + 1) <= i}
    loops = [lines[start:stop] for start, stop in sorted(back.items())]
    found = [loop for loop in loops if any("MMA" in line for line in loop)]
    if not found:
        raise LowerError("no loop with a matrix instruction was found in the machine code; the product may have been unrolled or compiled away")
    return found


def _mnemonic(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
