"""The rows of results/quantization_MODEL.json as the Markdown table of the documentation: methods down, bit widths across.

    python benchmarks/quantization_table.py smollm2 perplexity
    python benchmarks/quantization_table.py minilm cosine_mean

Cells hold the score at the true bits per weight.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WIDTHS = (4, 3, 2)
DIGITS = {"perplexity": 2, "cosine_mean": 4}


def table(rows: dict[str, Any], score: str) -> str:
    """Score at true bits per weight, from the weakest method at 3 bits to the best; `-` where a method has no such width."""
    methods = list(dict.fromkeys(name.split(", ", 1)[1] for name in rows if name != "dense"))
    better = -1 if score == "perplexity" else 1
    methods.sort(key=lambda m: better * (rows.get(f"3 bits, {m}") or rows[f"4 bits, {m}"])[score])
    lines = ["| method | " + " | ".join(f"{b} bits" for b in WIDTHS) + " |", "|---" * (1 + len(WIDTHS)) + "|"]
    for method in methods:
        found = [rows.get(f"{b} bits, {method}") for b in WIDTHS]
        cells = ["-" if f is None else f"{f[score]:,.{DIGITS[score]}f} at {f['bits']:.2f}" for f in found]
        bold = "**" if method.startswith("ours") else ""
        lines.append(f"| {bold}{method}{bold} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    model, wanted = sys.argv[1:]
    print(table(json.loads((Path(__file__).with_name("results") / f"quantization_{model}.json").read_text()), wanted))
