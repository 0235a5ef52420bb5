"""The rows of results/factorization_MODEL.json as the Markdown table of the documentation: methods down, kept shares of the linears across.

python benchmarks/factorization_table.py smollm2 perplexity
python benchmarks/factorization_table.py minilm cosine_mean
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHARES = ("90 %", "80 %", "70 %", "60 %")
DIGITS = {"perplexity": 2, "cosine_mean": 4}


def table(rows: list[dict[str, Any]], score: str) -> str:
    """Scores from the weakest method at 80 % to the best; `-` where a row was not run."""
    found = {(r["method"], r["ratio"]): r[score] for r in rows if r["ratio"]}
    better = -1 if score == "perplexity" else 1
    methods = list(dict.fromkeys(m for m, _ in found))
    methods.sort(key=lambda m: better * found.get((m, "80 %"), next(v for (n, _), v in found.items() if n == m)))
    lines = ["| method | " + " | ".join(SHARES) + " |", "|---" * (1 + len(SHARES)) + "|"]
    for method in methods:
        bold = "**" if method.startswith("ours") else ""
        cells = [f"{found[method, s]:,.{DIGITS[score]}f}" if (method, s) in found else "-" for s in SHARES]
        lines.append(f"| {bold}{method}{bold} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    model, wanted = sys.argv[1:]
    print(table(json.loads((Path(__file__).with_name("results") / f"factorization_{model}.json").read_text()), wanted))
