"""The CompactifAI recipe at the scale of SmolLM2-135M: fewer parameters, healing, 4 bits; against plain 4, 3 and 2 bits, by the bytes of the whole model.

    python benchmarks/compactifai_lm.py [--windows 8] [--rows "ours"]
    python benchmarks/compactifai_lm.py --long --device cuda     # healed on 2.1 million tokens (six passes over 348,160)

Both tables (embedding and head) have 4 bits in every row. Healing sees 24,576 tokens, or with --long 2,097,152. Rows go to
benchmarks/results/compactifai_lm.json one by one; rows that the file holds are kept. Baseline: the package's 4-bit weights dequantized to fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from factorization_lm import HEAL, row, smollm2

RESULTS = Path(__file__).with_name("results") / "compactifai_lm.json"
TABLES = "quantize_rtn{bits=4,group_size=64,kinds=[embedding]}"
FOUR = ["quantize_gptq{bits=4,group_size=64}", TABLES]
HEAD = ["quantize_gptq{bits=4,group_size=64,only=[lm_head]}", TABLES]
RECIPES: dict[str, list[str]] = {
    "plain 4 bits (GPTQ g64)": FOUR,
    "plain 3 bits (LNQ)": ["quantize_lut{bits=3,skip=[lm_head]}", *HEAD],
    "plain 2 bits (LNQ, 0.45 % apart)": ["quantize_lut{bits=2,outliers=0.004,sensitive=0.0005,skip=[lm_head]}", *HEAD],
    "ours: modules at 50 %, healed, 4 bits": ["decompose_modules{ratio=0.5}", HEAL, *FOUR],
    "ours: modules at 40 %, healed, 4 bits": ["decompose_modules{ratio=0.4}", HEAL, *FOUR],
    "ours: modules at 39.5 %, healed, 4 bits": ["decompose_modules{ratio=0.395}", HEAL, *FOUR],
    "CompactifAI: MPO of the weights (t = 2) at 50 %, down projections dense, healed, 4 bits": [
        "factorize_mpo{ratio=0.3,family=2,metric=weight,skip=[*down_proj]}", HEAL, *FOUR,
    ],
    "whitened pairs at 50 %, healed, 4 bits": ["factorize_svd{ratio=0.5}", HEAL, *FOUR],
}  # fmt: skip


WINDOWS, BATCH = 680, 8  # of 512 tokens: all of the even articles
LONG = "recover{steps=512,lr=3e-4,evaluate_every=64,patience=8,dtype=bf16}"  # 8 windows a step
LONG_NAME = "healed (2.1 M tokens)"


def recipes(long: bool) -> dict[str, list[str]]:
    """Recipes by name; the long ones are those that heal, with more steps."""
    if not long:
        return RECIPES
    return {n.replace("healed", LONG_NAME): [LONG if s == HEAL else s for s in specs] for n, specs in RECIPES.items() if HEAL in specs}


def main() -> None:
    """Run every recipe that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--rows", default="", help="run recipes whose name contains this")
    parser.add_argument("--long", action="store_true", help="heal on 2.1 million tokens")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the rows")
    arguments = parser.parse_args()
    out, known = arguments.out, recipes(arguments.long)
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    wanted = [n for n in known if arguments.rows in n and not any(r["method"] == n for r in rows)]
    sizes = {"training_windows": WINDOWS, "batch": BATCH} if arguments.long else {}
    bench = smollm2(arguments.windows, device=arguments.device, **sizes) if wanted else None
    for name in wanted:
        assert bench is not None
        rows.append(row(bench, "", name, known[name]))
        print(f"  {1 - rows[-1]['bytes_kept']:.1%} fewer bytes than fp32", flush=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
